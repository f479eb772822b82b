"""Small SD, one layer in each of four blocks: the calls of v1, by the id of its card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from safelight.model import Model
from systems_micro import (
    SAMPLERS,
    close,
    drawing,
    extra_noise,
    first_noise,
    latents_of,
    make_text,
    make_tokenizer,
    make_unet,
    make_vae,
    photo,
    schedulers,
)

ID = "OFA-Sys/small-stable-diffusion-v0/"
PROMPT = "a apple, 4k"
SHAPE = (1, 4, 16, 8)
SIZE: dict[str, Any] = {"width": 16, "height": 32}
LAYOUT: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": (*3 * ("CrossAttnDownBlock2D",), "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *3 * ("CrossAttnUpBlock2D",)),
}


def parts(sampler: str = "pndm", layers: int = 1) -> dict[str, Any]:
    return {
        "unet": make_unet(**LAYOUT, layers_per_block=layers),
        "vae": make_vae(),
        "text_encoder": make_text(),
        "tokenizer": make_tokenizer(),
        "scheduler": schedulers()[sampler],
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache in which the card's repository lies, and nothing else."""
    place = tmp_path / "cache" / "models--OFA-Sys--small-stable-diffusion-v0"
    StableDiffusionPipeline(**parts()).save_pretrained(place / "snapshots" / ("a" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    original = huggingface_hub.snapshot_download

    def cached(*arguments: Any, **options: Any) -> str:
        assert options.get("local_files_only")
        return original(*arguments, cache_dir=tmp_path / "cache", **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    return place / "snapshots" / ("a" * 40)


def test_by_the_cards_id_with_its_slash(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"prompt": PROMPT, "steps": 2, "seed": 3, **SIZE}
    wanted = latents_of(Model.load(published, device="cpu"), **given)
    for name in (ID, ID.rstrip("/"), "small-sd"):
        model = Model.load(name, device="cpu", local_only=True)
        assert (model.spec.family, model.spec.unet.layers_per_block) == ("sd-v1", 1)
        assert (latents_of(model, **given) == wanted).all()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(published, ID)
    shutil.rmtree(tmp_path / "cache")
    assert (latents_of(Model.load(ID, device="cpu"), **given) == wanted).all()


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_its_pictures_are_the_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, scale: float
) -> None:
    pipeline = StableDiffusionPipeline(**parts(sampler))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    model = Model.load(tmp_path, device="cpu")
    run = {"num_inference_steps": 7, "guidance_scale": scale, "negative_prompt": "bad"}
    with drawing(monkeypatch, first_noise(3, *SHAPE)):
        theirs = pipeline(PROMPT, **SIZE, **run, output_type="latent").images
    given: dict[str, Any] = {"prompt": PROMPT, "seed": 3, **SIZE, **run}
    close(latents_of(model, **given), theirs)
    again = StableDiffusionImg2ImgPipeline(**pipeline.components)
    again.set_progress_bar_config(disable=True)
    image = {"image": photo(16, 32), "strength": 0.6}
    with drawing(monkeypatch, extra_noise(3, "posterior", *SHAPE), first_noise(3, *SHAPE)):
        started = again(PROMPT, **image, **run, output_type="latent").images
    close(latents_of(model, **image, strength_rule="diffusers", **given), started)


def test_its_teachers_first_layers_make_another_picture(tmp_path: Path) -> None:
    """The check above sees a layer too many: v1 has two a block."""
    small = StableDiffusionPipeline(**parts())
    teacher = StableDiffusionPipeline(**parts(layers=2))
    for name, pipeline in (("small", small), ("v1", teacher)):
        pipeline.save_pretrained(tmp_path / name)
    given: dict[str, Any] = {"prompt": PROMPT, "steps": 2, "seed": 3, **SIZE}
    one, two = (
        latents_of(Model.load(tmp_path / name, device="cpu"), **given) for name in ("small", "v1")
    )
    with pytest.raises(AssertionError):
        close(one, two)
