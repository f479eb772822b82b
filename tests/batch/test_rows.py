"""What a row asks for is what the same fields ask for anywhere else."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from safelight.batch.rows import Defaults, Wish, assignments, check_columns, known, seed_of, wish
from safelight.batch.table import Entry, open_table
from safelight.errors import InvalidRequest
from safelight.request import ALIASES, GenerateRequest


def png(side: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(out, "PNG")
    return out.getvalue()


def understood(
    given: dict[str, Any],
    folder: Path = Path(),
    *,
    row: int = 1,
    typed: bool = True,
    ignore: bool = False,
    **defaults: Any,
) -> Wish:
    behind = Defaults(defaults, "tiny", 5, ignore=ignore)
    return wish(Entry(row, f"line {row}", given, typed=typed), behind, folder)


def request(*arguments: Any, **keywords: Any) -> GenerateRequest:
    found = understood(*arguments, **keywords)
    assert found.error is None, found.error
    assert found.request is not None
    return found.request


WORDS = {
    "prompt": "a red cube",
    "negative": "blurred",
    "num_inference_steps": "12",
    "cfg_scale": "3.5",
    "guidance_rescale": "0.5",
    "guidance_interval": "0.1 5",
    "sampler_name": "DPM++ 2M Karras",
    "sampler_options": '{"order": 2}',
    "size": "64x32",
    "seed": "7",
    "n": "2.0",
    "CLIP_stop_at_last_layers": "2",
    "use_compel": "true",
    "loras": "style.safetensors:0.5; other",
    "embeddings": "cat.bin:<cat>",
    "deterministic": "yes",
    "safety": "off",
}
VALUES = {
    **WORDS,
    "num_inference_steps": 12,
    "cfg_scale": 3.5,
    "guidance_rescale": 0.5,
    "guidance_interval": [0.1, 5],
    "sampler_options": {"order": 2},
    "seed": 7,
    "n": 2,
    "CLIP_stop_at_last_layers": 2,
    "use_compel": True,
    "loras": [["style.safetensors", 0.5], ["other", 1]],
    "embeddings": [["cat.bin", "<cat>"]],
    "deterministic": True,
}


@pytest.mark.parametrize("given", [WORDS, VALUES], ids=["text", "typed"])
def test_a_row_is_the_request_of_its_fields(given: dict[str, Any]) -> None:
    fields = {**VALUES, "width": 64, "height": 32}
    del fields["size"]
    assert request(given, typed=given is VALUES) == GenerateRequest.from_kwargs(**fields)


def test_every_spelling_is_a_column() -> None:
    for name in (*GenerateRequest.model_fields, *ALIASES, "use_compel", "lora_scale", "size"):
        assert known(name), name


def test_a_deepinfra_row() -> None:
    assert request({"prompt": "a", "lora": "x", "lora_scale": "0.5"}, typed=False).loras == (
        ("x", 0.5),
    )


def test_options_stand_behind_columns() -> None:
    made = request(
        {"prompt": "a", "cfg_scale": 2, "scheduler": "EulerDiscreteScheduler"},
        guidance_scale=7.0,
        steps=9,
        sampler="ddim",
    )
    assert (made.guidance_scale, made.steps, made.sampler) == (2, 9, "euler")
    assert request({"prompt": "a", "size": 64}, width=128).width == 64


def test_seeds_follow_from_the_run_and_the_row() -> None:
    made = [request({"prompt": "a", "seed": -1}, row=row).seed for row in (1, 2, 1)]
    assert made == [seed_of(5, 1), seed_of(5, 2), seed_of(5, 1)]
    assert made[0] != made[1]
    assert len({seed_of(run, row) for run in range(50) for row in range(50)}) == 2500
    assert all(0 <= seed_of(9, row) < 2**32 for row in range(100))
    # Written down once: it must never change, or old folders would go on otherwise.
    assert seed_of(1, 1) == 1093531623
    assert request({"prompt": "a", "seed": 3}).seed == 3
    same = wish(Entry(9, "", {"prompt": "a"}), Defaults({}, "tiny", 5, same_seed=True), Path())
    assert same.request is not None
    assert same.request.seed == 5


def test_pictures_lie_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png(16))
    text = base64.b64encode(png()).decode()
    ways: list[Any] = ["sub/a.png", str(tmp_path / "sub/a.png"), text]
    ways += [f"data:image/png;base64,{text}", png(), {"bytes": png(), "path": None}]
    digests = {
        request({"prompt": "a", "init_image": way}, tmp_path).pictures["image"].digest
        for way in ways
    }
    assert len(digests) == 1
    several = request({"images": "sub/a.png;b.png"}, tmp_path, typed=False).images
    assert [each.size for each in several] == [(8, 8), (16, 16)]
    again = request({"images": ["sub/a.png", "b.png"]}, tmp_path).images
    assert again == several


@pytest.mark.parametrize(
    ("given", "field", "words"),
    [
        ({"prompt": "a", "steps": "x"}, "steps", "must be a whole number, not 'x'."),
        ({"prompt": "a", "steps": 0}, "steps", "at least 1"),
        ({"prompt": "a", "CFG Scale": "much"}, "cfg_scale", "must be a number"),
        ({"steps": 3}, "prompt", "is missing"),
        ({"prompt": "a", "image": "none.png"}, "image", "no file"),
        ({"prompt": "a", "image": "http://localhost/a.png"}, "image", "is an address"),
        ({"prompt": "a", "image": "data:image/png;base64,?"}, "image", "is not base64"),
        ({"prompt": "a", "size": "big"}, "size", "is not a size"),
        ({"prompt": "a", "size": 64, "w": 64}, "size", "comes with a width"),
        ({"prompt": "a", "n": 1, "count": 2}, "count", "means the same"),
        ({"prompt": "a", "model": " "}, "model", "is not a name"),
        ({"prompt": "a \ud800"}, "prompt", "half a character"),
        ({"prompt": "a", "prmopt": "b"}, "prmopt", "no column"),
        ({"prompt": "a", "sampler_options": "{"}, "sampler_options", "is not JSON"),
        ({"prompt": "a", "sampler": "magic"}, "sampler", "magic"),
    ],
)
def test_a_wrong_row_says_so(tmp_path: Path, given: dict[str, Any], field: str, words: str) -> None:
    for typed in (True, False):
        found = understood(given, tmp_path, typed=typed)
        if typed and isinstance(given.get("sampler_options"), str):
            continue
        assert found.request is None
        assert found.error is not None
        assert found.error["field"] == field
        assert words in found.error["problem"]


def test_columns_are_checked_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,id,Num Steps\na,x,3\n")
    table = open_table(path)
    with pytest.raises(InvalidRequest, match=r"^id: is no column .* --ignore-columns"):
        check_columns(table)
    check_columns(table, ignore=True)
    path.write_text("prompt,negative_promt\na,b\n")
    with pytest.raises(InvalidRequest, match=r"Did you mean negative_prompt\?"):
        check_columns(open_table(path))
    found = understood({"prompt": "a", "id": "x", "vector": [1.0]}, ignore=True)
    assert found.extra == {"id": "x"}
    assert found.request is not None


def test_defaults_are_checked_once() -> None:
    Defaults({"strength": 0.5, "mask_crop": 8, "steps": 3}, "tiny", 0).check()
    with pytest.raises(InvalidRequest, match="strength"):
        Defaults({"strength": 2.0}, "tiny", 0).check()


def test_assignments() -> None:
    found = assignments(["cfg=2.5", "prompt = x=y", "strength=0.5", "noise_level=3"])
    assert found == {"guidance_scale": 2.5, "prompt": " x=y", "strength": 0.5, "noise_level": 3}
    for text in ("steps", "stepps=3", "model=x", "seed=3"):
        with pytest.raises(InvalidRequest, match="set"):
            assignments([text])
    with pytest.raises(InvalidRequest, match="steps"):
        assignments(["steps=x"])
