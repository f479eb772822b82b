"""Every system through the one generate: what it can, what it cannot, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from micro_models import MICRO, micro_model, toy_model
from micro_systems import half_mask, photo, system, system_spec
from safelight import presets, provenance
from safelight.cli.models import write
from safelight.conditioning.planes import ESTIMATOR
from safelight.errors import InvalidRequest, MissingExtra, WeightsError
from safelight.generate import Generator
from safelight.generate.able import check
from safelight.generate.course import picture, plot
from safelight.generate.scene import crop_box
from safelight.model import Model
from safelight.request import GenerateRequest, ImageResult
from safelight.spec import ModelSpec, PriorSpec

CUBE = "a red cube on top of a blue sphere"


def pixels(result: ImageResult) -> np.ndarray:
    assert result.image is not None, result.message
    return np.asarray(result.image, dtype=int)


def apart(a: ImageResult, b: ImageResult) -> float:
    return float(np.abs(pixels(a) - pixels(b)).mean())


# -- strength --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> Generator:
    return Generator(micro_model())


def test_strength_0_gives_the_picture_back_resized_and_marked(
    plain: Generator, tmp_path: Path
) -> None:
    calls = plain.engine.calls
    (result,) = plain.generate(CUBE, image=photo(64, 64), strength=0, seed=1, width=32, height=32)
    wanted = photo(64, 64).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(result), np.asarray(wanted))
    assert plain.engine.calls == calls
    assert result.outcome == "ok"
    assert "strength 0" in result.message
    provenance.save(result, tmp_path / "a.png")
    said = provenance.read(tmp_path / "a.png").request
    assert said.strength == 0
    assert said.image is not None
    with pytest.raises(InvalidRequest, match="strength"):
        plain.generate(CUBE, image=photo(), strength=0, strength_rule="diffusers")


@pytest.mark.parametrize("sampler", ["pndm", "euler", "dpm++2m"])
def test_strength_1_is_pure_noise_and_the_reference_rule_is_not(
    plain: Generator, sampler: str
) -> None:
    given: dict[str, Any] = {"seed": 1, "steps": 4, "sampler": sampler}
    (free,) = plain.generate(CUBE, **given)
    (whole,) = plain.generate(CUBE, image=photo(), strength=1, **given)
    assert apart(free, whole) == 0
    (trace,) = plain.generate(CUBE, image=photo(), strength=1, strength_rule="diffusers", **given)
    assert apart(free, trace) > 0


def test_more_strength_strays_farther_in_as_many_steps(plain: Generator) -> None:
    (start,) = plain.generate(CUBE, image=photo(), strength=0, seed=1)
    near, far = (
        plain.generate(CUBE, image=photo(), strength=s, seed=1, steps=6, guidance_scale=1)[0]
        for s in (0.02, 0.9)
    )
    seen = plain.model.runtime.encode(torch.zeros(1, 3, 32, 32))
    assert seen.mean.shape == (1, 4, 4, 4)
    assert apart(near, far) > 0
    assert start.image is not None
    for strength, sampler in ((0.5, "ddim"), (0.01, "pndm"), (0.3, "heun")):
        request = GenerateRequest(
            prompt=CUBE,
            image=photo(),  # type: ignore[arg-type]
            strength=strength,
            steps=6,
            sampler=sampler,
        ).resolved(plain.model.spec)
        course = plot(plain.model, request)
        wanted = {"ddim": 6, "heun": 12, "pndm": 6}[sampler]
        assert abs(course.calls - wanted) <= 1
        low = course.grid.start_timestep
        assert abs(low - 1000 * strength) < 120
        old = plot(plain.model, request.replace(strength=0.5, strength_rule="diffusers"))
        assert len(old.grid) <= 4


def test_pictures_of_one_call_share_a_look_and_have_noise_of_their_own(plain: Generator) -> None:
    two = plain.generate(CUBE, image=photo(), seed=3, count=2, steps=3)
    (alone,) = plain.generate(CUBE, image=photo(), seed=4, steps=3)
    assert np.abs(pixels(two[1]) - pixels(alone)).max() <= 1
    assert apart(*two) > 0


# -- many steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["pndm", "ddim"])
def test_steps_that_the_models_own_grid_breaks_are_laid_out_anew(
    plain: Generator, sampler: str
) -> None:
    def course(**fields: Any) -> Any:
        request = GenerateRequest(prompt=CUBE, sampler=sampler, **fields)
        return plot(plain.model, request.resolved(plain.model.spec))

    for steps in (501, 512, 1000):
        laid = course(steps=steps)
        assert laid.grid.timesteps[0] == 999
        assert len(set(laid.grid.timesteps)) == steps
        assert "trailing steps are used instead" in laid.notes[0]
    assert course(steps=500).notes == ()
    assert course(steps=500).grid.timesteps[0] == 999
    told = course(steps=512, schedule="leading")
    assert told.grid.timesteps[0] == 512
    assert "may be broken" in told.notes[0]


def test_512_steps_reach_the_picture_of_fewer() -> None:
    toy = Generator(toy_model())
    given: dict[str, Any] = {"seed": 1, "guidance_scale": 1}
    (many,) = toy.generate(CUBE, steps=512, **given)
    (few,) = toy.generate(CUBE, steps=100, schedule="trailing", sampler="dpm++2m", **given)
    (broken,) = toy.generate(CUBE, steps=512, schedule="leading", **given)
    assert "trailing" in many.notices[0]
    assert apart(many, few) < apart(broken, few)


# -- inpainting ------------------------------------------------------------------------------------


def test_a_region_is_repainted_and_pasted_into_the_picture_as_it_came(plain: Generator) -> None:
    big = photo(200, 120)
    mask = Image.new("L", big.size)
    mask.paste(255, (50, 40, 80, 60))
    (result,) = plain.generate(CUBE, image=big, mask=mask, mask_crop=8, seed=1, steps=2)
    changed = np.abs(pixels(result) - np.asarray(big, dtype=int)).max(axis=2) > 0
    inside = np.asarray(mask) > 0
    assert pixels(result).shape == (120, 200, 3)
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.5
    soft = plain.generate(
        CUBE, image=big, mask=mask, mask_crop=16, mask_feather=8, seed=1, steps=2
    )[0]
    around = np.abs(pixels(soft) - np.asarray(big, dtype=int)).max(axis=2) > 0
    assert around[~inside].any()
    assert not around[:20].any()


@pytest.mark.parametrize(
    ("marked", "padding", "whole", "shape"),
    [
        ((50, 40, 80, 60), 8, (200, 120), (64, 64)),
        ((0, 0, 5, 5), 0, (200, 120), (64, 32)),
        ((190, 110, 200, 120), 30, (200, 120), (64, 64)),
        ((0, 0, 200, 120), 5, (200, 120), (64, 64)),
    ],
)
def test_the_region_holds_the_mask_and_keeps_the_shape(
    marked: Any, padding: int, whole: Any, shape: Any
) -> None:
    left, top, right, bottom = crop_box(marked, padding, whole, shape)
    assert 0 <= left <= marked[0]
    assert 0 <= top <= marked[1]
    assert marked[2] <= right <= whole[0]
    assert marked[3] <= bottom <= whole[1]
    if (right - left, bottom - top) != whole and marked[0] > 0 and bottom - top < whole[1]:
        assert (right - left) / (bottom - top) == pytest.approx(shape[0] / shape[1], rel=0.05)


def test_what_the_mask_keeps_is_kept(plain: Generator) -> None:
    def latents(prompt: str, feather: int = 0) -> torch.Tensor:
        request = GenerateRequest(
            prompt=prompt,
            image=photo(),  # type: ignore[arg-type]
            mask=half_mask(),  # type: ignore[arg-type]
            mask_feather=feather,
            steps=3,
            seed=1,
        ).resolved(plain.model.spec)
        made = picture(plain.model, request, plot(plain.model, request))
        plain.engine.run([made])
        return made.result()

    first, other = latents(CUBE), latents("a cone")
    assert torch.equal(first[..., 2:], other[..., 2:])
    assert (first[..., :2] - other[..., :2]).abs().mean() > 1e-3
    soft = latents(CUBE, feather=16)
    assert (soft[..., 2] - first[..., 2]).abs().max() > 1e-4  # the edge is a mixture
    assert torch.allclose(soft[..., 3], first[..., 3], atol=0.1)


def test_clear_pixels_are_the_mask_of_an_inpainting_model() -> None:
    paint = system("inpaint")
    clear = photo().convert("RGBA")
    clear.putalpha(Image.eval(half_mask(), lambda v: 255 - v))
    white = Image.new("RGB", (32, 32), "white")
    white.paste(photo(), mask=clear.getchannel("A"))
    (a,) = paint.generate(CUBE, image=clear, seed=1, steps=2)
    (b,) = paint.generate(CUBE, image=white, mask=half_mask(), seed=1, steps=2)
    assert apart(a, b) == 0
    with pytest.raises(InvalidRequest, match="mask: is missing"):
        paint.generate(CUBE, image=photo())
    with pytest.raises(InvalidRequest, match="mask: marks nothing"):
        paint.generate(CUBE, image=photo(), mask=Image.new("L", (32, 32)))


# -- what each can ---------------------------------------------------------------------------------

WORDLESS = {"prompt": "", "image": photo()}
CANNOT: list[tuple[str, dict[str, Any], str, str]] = [
    ("sd-v1", {"depth": photo()}, "depth", "depth"),
    ("sd-v1", {"noise_level": 3}, "noise_level", "unclip, x4-upscaler"),
    ("sd-v1", {"images": [photo()]}, "images", "image-variations, unclip"),
    ("sd-v1", {"image_embedding": [1.0]}, "image_embedding", "image-variations, unclip"),
    ("sd-v1", {"prior_steps": 3}, "prior_steps", "no prior"),
    ("inpaint", {}, "image", "repaints a picture"),
    ("x4-upscaler", {}, "image", "enlarges a picture"),
    ("x4-upscaler", {"image": photo(), "mask": half_mask()}, "mask", "inpaint"),
    ("depth", {}, "depth", "follows a depth map"),
    ("unclip", {}, "image", "a prior for text alone"),
    ("unclip", {"image": photo(), "strength": 0.5}, "strength", "sd-v1"),
    ("unclip", {"image_embedding": [1.0, 2.0]}, "image_embedding", "reads 16"),
    ("image-variations", {"image": photo()}, "prompt", "reads no text"),
    ("image-variations", {**WORDLESS, "negative_prompt": "a"}, "negative_prompt", "reads no text"),
    ("image-variations", {**WORDLESS, "noise_level": 3}, "noise_level", "unclip"),
]


@pytest.mark.parametrize(("family", "fields", "named", "says"), CANNOT)
def test_a_model_that_cannot_says_which_can(
    family: str, fields: dict[str, Any], named: str, says: str
) -> None:
    made = system_spec(family)
    with pytest.raises(InvalidRequest) as caught:
        check(made, GenerateRequest(**{"prompt": CUBE, **fields}).resolved(made))
    assert caught.value.field == named
    assert says in str(caught.value)


def test_every_preset_is_what_it_says_it_is() -> None:
    known = [value for value in vars(presets).values() if isinstance(value, ModelSpec)]
    assert {each.family for each in known} == {
        "sd-v1", "sd-v2", "inpaint", "depth", "image-variations", "unclip", "x4-upscaler",
    }  # fmt: skip
    assert len({each.name for each in known}) == len(known) >= 12
    for each in known:
        given: dict[str, Any] = {"prompt": "" if each.text is None else CUBE}
        if each.family not in ("sd-v1", "sd-v2"):
            given["image"] = photo()
        check(each, GenerateRequest(**given).resolved(each))


@pytest.mark.parametrize("family", ["image-variations", "unclip"])
def test_pictures_are_followed(family: str) -> None:
    made = system(family)
    words = {"prompt": CUBE} if family == "unclip" else {}
    given: dict[str, Any] = {"seed": 1, "steps": 2, **words}
    (one,) = made.generate(image=photo(), **given)
    (same,) = made.generate(images=[photo()], **given)
    (other,) = made.generate(image=photo().rotate(90), **given)
    assert apart(one, same) == 0
    assert apart(one, other) > 0
    (square,) = made.generate(image=photo(48, 32), picture_fit="square", **given)
    (crop,) = made.generate(image=photo(48, 32), **given)
    assert apart(square, crop) > 0
    together = made.generate(image=photo(), count=2, **given)
    assert apart(one, together[0]) <= 1 / 255 * 10
    assert apart(*together) > 0


def test_unclip_says_what_its_noise_levels_mean() -> None:
    made = system("unclip")
    given: dict[str, Any] = {"image": photo(), "seed": 1, "steps": 2}
    (zero,) = made.generate(**given)
    assert "still adds a little noise" in zero.notices[0]
    (last,) = made.generate(noise_level=999, **given)
    (more,) = made.generate(noise_level=1000, **given)
    assert last.notices == ()
    assert "read as 999" in more.notices[0]
    assert apart(last, more) == 0
    assert apart(zero, last) > 0


def chain() -> Generator:
    """unCLIP with a prior in front."""
    text = MICRO.text
    assert text is not None
    prior = PriorSpec(
        heads=2,
        head_width=8,
        layers=1,
        embedding_width=16,
        text_tokens=text.context_length,
        text=text.replace(projection_width=16),
        steps=3,
    )
    return system("unclip", prior=prior)


def test_the_prior_makes_pictures_from_text_alone() -> None:
    made = chain()
    (a,) = made.generate(CUBE, seed=1, steps=2)
    (b,) = made.generate("a cone", seed=1, steps=2)
    assert (a.request.prior_steps, a.request.prior_guidance_scale) == (3, 4.0)
    assert apart(a, b) > 0
    (looking,) = made.generate(CUBE, image=photo(), seed=1, steps=2)
    assert looking.request.prior_steps is None
    with pytest.raises(InvalidRequest, match="prior_steps"):
        made.generate(CUBE, image=photo(), prior_steps=3)


def test_the_prior_reads_the_prompt_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made = chain()
    assert made.model.prior is not None
    heard: list[str] = []
    sample = made.model.prior.sample

    def listen(prompt: str, *arguments: Any, **options: Any) -> torch.Tensor:
        heard.append(prompt)
        return sample(prompt, *arguments, **options)

    monkeypatch.setattr(made.model.prior, "sample", listen)
    given: dict[str, Any] = {"seed": 1, "steps": 2}
    (plain,) = made.generate("a red cube", **given)
    (same,) = made.generate("a (red:1.0) cube", weighting="a1111", **given)
    (other,) = made.generate("a (red:1.8) cube", weighting="a1111", **given)
    made.generate("a red++ (cube)0.5", weighting="compel", **given)
    made.generate("a (red:1.2) cube", **given)
    assert heard == [*4 * ["a red cube"], "a (red:1.2) cube"]
    assert apart(plain, same) == 0
    assert apart(plain, other) > 0


def test_depth_from_a_map_alone_and_without_the_estimator(monkeypatch: pytest.MonkeyPatch) -> None:
    made = system("depth")
    near = np.tile(np.linspace(0, 1, 32), (32, 1))
    (a,) = made.generate(CUBE, depth=near, seed=1, steps=2)
    (b,) = made.generate(CUBE, depth=near[:, ::-1], seed=1, steps=2)
    (flat,) = made.generate(CUBE, depth=np.ones((32, 32)), seed=1, steps=2)
    assert apart(a, b) > 0
    assert flat.outcome == "ok"
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"safelight\[depth\]"):
        made.generate(CUBE, image=photo(), seed=1, steps=2)


@pytest.mark.parametrize("local_only", [True, None])
def test_the_estimator_is_fetched_only_where_the_network_may_be_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, local_only: bool | None
) -> None:
    transformers = pytest.importorskip("transformers")
    asked: list[tuple[str, bool]] = []

    def from_pretrained(place: str, *, local_files_only: bool) -> Any:
        asked.append((place, local_files_only))
        raise OSError("not in the cache")

    loader = transformers.DPTForDepthEstimation
    monkeypatch.setattr(loader, "from_pretrained", from_pretrained)
    write(system("depth").model, tmp_path / "depth")
    made = Generator(Model.load(tmp_path / "depth", device="cpu", local_only=local_only))
    words = "network may not be asked" if local_only else "cannot be read: not in the cache"
    with pytest.raises(WeightsError, match=f"{ESTIMATOR}.*{words}.*Give a depth map"):
        made.generate(CUBE, image=photo(), seed=1, steps=2)
    assert asked == [(ESTIMATOR, bool(local_only))]


def test_a_picture_is_made_again_from_its_file_and_the_one_it_came_from(
    plain: Generator, tmp_path: Path
) -> None:
    photo().save(tmp_path / "in.png")
    (result,) = plain.generate(CUBE, image=tmp_path / "in.png", strength=0.5, seed=2, steps=3)
    path = provenance.save(result, tmp_path / "out.png")
    again = plain.replay(path, image=tmp_path / "in.png")
    assert again.difference is not None
    assert again.difference.largest == 0
    with pytest.raises(InvalidRequest, match="Give the file again"):
        plain.replay(path)
    photo(30).save(tmp_path / "other.png")
    with pytest.raises(InvalidRequest, match="not the file it was made from"):
        plain.replay(path, image=tmp_path / "other.png")
