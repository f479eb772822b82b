"""The form as a request, and a picture's settings as the form."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from fake_server import detail, png
from safelight.errors import InvalidRequest
from safelight.request import GenerateRequest
from safelight.serve.dialects import native
from safelight.ui import form

VALUES: dict[str, Any] = {
    "model": "toy",
    "prompt": " a red cube ",
    "negative_prompt": "fog",
    "count": 2,
    "steps": 9,
    "guidance_scale": 4.5,
    "guidance_rescale": 0.7,
    "seed": " 12 ",
    "size": form.CUSTOM,
    "width": 64,
    "height": 96,
    "weighting": "compel",
    "sampler": "ddim",
    "schedule": "karras",
    "clip_skip": 1,
    "eta": 0.5,
    "safety": "blur",
    "preview_every": 3,
    "lora": "style",
    "lora_scale": 0.6,
    "lora_2": "",
    "lora_2_scale": 1.0,
    "embeddings": ["toad"],
    "image_strength": 0.7,
    "inpaint_strength": 1.0,
}


def body(mode: str = "text", family: str = "sd-v1", **changes: Any) -> dict[str, Any]:
    return form.body(mode, {**VALUES, **changes}, detail(family=family))


def as_request(made: dict[str, Any]) -> GenerateRequest:
    """As the server reads it."""
    return native.read({name: value for name, value in made.items() if name != "model"})


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    path.write_bytes(png())
    return str(path)


def test_every_field_arrives() -> None:
    asked = as_request(body())
    assert asked.prompt == "a red cube"
    assert asked.negative_prompt == "fog"
    assert (asked.count, asked.steps, asked.guidance_scale, asked.seed) == (2, 9, 4.5, 12)
    assert (asked.width, asked.height, asked.weighting) == (64, 96, "compel")
    assert (asked.sampler, asked.schedule, asked.guidance_rescale) == ("ddim", "karras", 0.7)
    assert (asked.clip_skip, asked.eta, asked.safety, asked.preview_every) == (1, 0.5, "blur", 3)
    assert asked.loras == (("style", 0.6),)
    assert asked.embeddings == (("toad", ""),)


def test_what_is_left_alone_is_the_models_own() -> None:
    plain = {"seed": "", "size": form.AUTO, "sampler": "", "schedule": "", "safety": ""}
    plain |= {"lora": "", "embeddings": [], "eta": None, "clip_skip": 0, "weighting": "none"}
    asked = as_request(body(**plain, guidance_rescale=0))
    default = GenerateRequest(prompt="x")
    for name in ("seed", "width", "sampler", "schedule", "safety", "eta", "clip_skip", "loras"):
        assert getattr(asked, name) == getattr(default, name), name


def test_eta_0_is_not_left_out() -> None:
    assert body(eta=0)["eta"] == 0


@pytest.mark.parametrize(("typed", "seed"), [("", None), ("-1", None), (str(2**62), 2**62)])
def test_seeds(typed: str, seed: int | None) -> None:
    assert body(seed=typed).get("seed") == seed


def test_image_to_image_sends_the_file_as_it_is(photo: str) -> None:
    made = body("image", image=photo)
    assert base64.b64decode(made["image"]) == Path(photo).read_bytes()
    assert as_request(made).strength == 0.7


def drawing(painted: bool = True) -> dict[str, Any]:
    layer = Image.new("RGBA", (32, 32))
    if painted:
        ImageDraw.Draw(layer).rectangle((4, 4, 11, 11), fill=(255, 0, 0, 90))
    return {"background": Image.new("RGBA", (32, 32), "blue"), "layers": [layer]}


def test_the_painted_part_is_the_mask() -> None:
    made = body("inpaint", drawing=drawing(), mask_feather=2, mask_around=True, mask_crop=8)
    mask = Image.open(io.BytesIO(base64.b64decode(made["mask"])))
    assert mask.getbbox() == (4, 4, 12, 12)
    assert mask.getextrema() == (0, 255)
    asked = as_request(made)
    assert (asked.mask_feather, asked.mask_crop, asked.strength) == (2, 8, 1.0)


def test_variations(photo: str) -> None:
    made = body("vary", "unclip", look=photo, vary_noise=300)
    assert as_request(made).noise_level == 300
    two = as_request(body("vary", "unclip", look=photo, look_2=photo, look_share=0.25))
    assert two.image_weights == (0.75, 0.25)
    silent = body("vary", "image-variations", look=photo, prompt="")
    assert "noise_level" not in silent
    assert "prompt" not in silent
    assert "negative_prompt" not in silent


def test_upscaling(photo: str) -> None:
    made = as_request(body("upscale", "x4-upscaler", small=photo, upscale_noise=50))
    assert made.noise_level == 50
    assert made.image is not None


@pytest.mark.parametrize(
    ("mode", "family", "changes", "field"),
    [
        ("text", "sd-v1", {"prompt": "  "}, "prompt"),
        ("text", "sd-v1", {"seed": "seven"}, "seed"),
        ("text", "x4-upscaler", {}, "model"),
        ("vary", "sd-v1", {}, "model"),
        ("upscale", "sd-v1", {}, "model"),
        ("image", "sd-v1", {"image": None}, "image"),
        ("image", "sd-v1", {"image": "/no/such/file"}, "image"),
        ("inpaint", "sd-v1", {"drawing": None}, "image"),
        ("inpaint", "sd-v1", {"drawing": drawing(False)}, "mask"),
        ("vary", "unclip", {}, "images"),
        ("vary", "image-variations", {"look": "x"}, "prompt"),
        ("upscale", "x4-upscaler", {}, "image"),
    ],
)
def test_a_wrong_field_is_named(
    mode: str, family: str, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        body(mode, family, **changes)
    assert refused.value.field == field
    assert form.label(field) in form.LABELS.values()


def test_the_form_and_back() -> None:
    """What a request says, filled in again, is the same request."""
    asked = as_request(body(count=1))
    again = form.filled(
        asked.model_dump(mode="json"), "toy", "sd-v1", served=["toy"], loras=["style"]
    )
    assert again.mode == "text"
    assert again.notes == ()
    values = {**VALUES, **dict.fromkeys(again.values, "left over"), **again.values}
    values["preview_every"] = 3
    assert as_request(form.body("text", values, detail())) == asked


def test_what_cannot_be_taken_over_is_told(photo: str) -> None:
    asked = as_request(body("image", image=photo))
    again = form.filled(asked.model_dump(mode="json"), "other", "sd-v1", served=["toy"])
    assert again.mode == "image"
    assert again.values["image_strength"] == 0.7
    assert "model" not in again.values
    told = " ".join(again.notes)
    assert "other" in told
    assert "style" in told
    assert "choose it again" in told


@pytest.mark.parametrize(
    ("family", "changes", "mode"),
    [
        ("x4-upscaler", {"image": "sha256:" + "0" * 64}, "upscale"),
        ("image-variations", {"image": "sha256:" + "0" * 64}, "vary"),
        ("unclip", {"prior_steps": 25}, "text"),
        ("sd-v1", {"image": "sha256:" + "0" * 64, "mask": "sha256:" + "0" * 64}, "inpaint"),
    ],
)
def test_settings_go_to_their_tab(family: str, changes: dict[str, Any], mode: str) -> None:
    assert form.filled({"prompt": "a", **changes}, None, family).mode == mode
