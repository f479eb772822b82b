"""The cards' own lines with only the import and the path changed, and the reference's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reference_pipelines import (
    as_first_revision,
    img2img_pipeline,
    unclip_pipeline,
    variations_pipeline,
)
from safelight import compat
from systems_micro import drawing, extra_noise, first_noise, photo

SIZE = {"width": 16, "height": 32}


def saved(pipeline: Any, folder: Path, **options: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder, **options)
    return pipeline


def same(ours: list[Image.Image], theirs: list[Image.Image]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        apart = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))
        assert apart.max() <= 1, "rounding, and nothing else"
        assert np.asarray(b).std() > 1


def test_the_card_of_image_variations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = saved(variations_pipeline("pndm"), tmp_path / "model")
    as_first_revision(tmp_path / "model", reference.image_encoder)
    photo(40, 24).save(tmp_path / "here.jpg")
    monkeypatch.chdir(tmp_path)
    # from lambda_diffusers import StableDiffusionImageEmbedPipeline
    from safelight.compat import StableDiffusionImageEmbedPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = StableDiffusionImageEmbedPipeline.from_pretrained("model")
    pipe = pipe.to(device)
    im = Image.open("here.jpg")
    num_samples = 4
    image = pipe(num_samples * [im], guidance_scale=3.0)
    image = image["sample"]
    base_path = Path("outputs/im2im")
    base_path.mkdir(exist_ok=True, parents=True)
    for idx, im in enumerate(image):
        im.save(base_path / f"{idx:06}.jpg")

    assert len(list(base_path.iterdir())) == 4
    assert len({im.tobytes() for im in image}) == 4


def test_variations_are_the_references(tmp_path: Path) -> None:
    reference = saved(variations_pipeline("ddim"), tmp_path)
    pipe = compat.StableDiffusionImageVariationPipeline.from_pretrained(tmp_path)
    asked: dict[str, Any] = {**SIZE, "num_inference_steps": 4, "guidance_scale": 3.0}
    theirs = reference(photo(40, 24), **asked, generator=torch.Generator().manual_seed(5)).images
    ours = pipe(photo(40, 24), **asked, generator=torch.Generator().manual_seed(5)).images
    same(ours, theirs)
    other = pipe(photo(40, 24), **asked, generator=torch.Generator().manual_seed(6)).images
    with pytest.raises(AssertionError):
        same(other, theirs)


def test_the_card_of_unclip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(unclip_pipeline("ddim").to(torch.float16), tmp_path / "model", variant="fp16")
    photo(40, 24).save(tmp_path / "tarsila.png")
    monkeypatch.chdir(tmp_path)
    # from diffusers import StableUnCLIPImg2ImgPipeline
    from safelight.compat import StableUnCLIPImg2ImgPipeline

    # Start the StableUnCLIP Image variations pipeline
    pipe = StableUnCLIPImg2ImgPipeline.from_pretrained(
        "model", torch_dtype=torch.float16, variation="fp16"
    )
    pipe = pipe.to("cpu")
    # as the card says: "in this example we are swapping it to DPMSolverMultistepScheduler"
    pipe.scheduler = compat.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

    init_image = Image.open("tarsila.png").convert("RGB")

    # Pipe to make the variation
    images = pipe(init_image).images
    images[0].save("tarsila_variation.png")

    request = pipe(init_image).results[0].request
    assert (request.sampler, request.steps, request.guidance_scale) == ("dpm++2m", 20, 10.0)
    assert Path("tarsila_variation.png").is_file()


def test_unclip_is_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = saved(unclip_pipeline("ddim"), tmp_path)
    pipe = compat.StableUnCLIPImg2ImgPipeline.from_pretrained(tmp_path)
    asked: dict[str, Any] = {**SIZE, "num_inference_steps": 4, "noise_level": 700}
    draws = extra_noise(3, "embedding", 12)[None], first_noise(3, 1, 4, 16, 8)
    with drawing(monkeypatch, *draws):
        theirs = reference(photo(40, 24), "abc", **asked).images
    generator = torch.Generator().manual_seed(3)
    same(pipe(photo(40, 24), "abc", **asked, generator=generator).images, theirs)


def test_image_to_image_is_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = saved(img2img_pipeline("ddim"), tmp_path)
    pipe = compat.StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path)
    shape = (1, 4, 16, 8)
    asked: dict[str, Any] = {"image": photo(16, 32), "strength": 0.6, "num_inference_steps": 5}
    with drawing(monkeypatch, extra_noise(3, "posterior", *shape), first_noise(3, *shape)):
        theirs = reference("abc", **asked).images
    generator = torch.Generator().manual_seed(3)
    same(pipe("abc", **asked, **SIZE, generator=generator).images, theirs)
