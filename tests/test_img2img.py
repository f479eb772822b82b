"""From a picture: the reference's rule of strength, and ours; inpainting, both ways; depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reference_pipelines import depth_estimator, depth_pipeline, img2img_pipeline, inpaint_pipeline
from safelight.conditioning import image as images
from safelight.conditioning import planes
from safelight.model import Cache
from systems_micro import (
    SAMPLERS,
    close,
    drawing,
    extra_noise,
    first_noise,
    latents_of,
    loaded,
    photo,
)

TO_PIXELS = images.to_pixels
PROMPT = "abc on top of xyz"
SHAPE = (1, 4, 16, 8)  # of latents; the micro autoencoder halves
PHOTO = photo(16, 32)
MASK = Image.fromarray(
    np.kron([[0, 255], [255, 0], [255, 255], [0, 0]], np.ones((8, 8))).astype("u1")
)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image_is_the_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, scale: float
) -> None:
    pipeline = img2img_pipeline(sampler)
    model = loaded(pipeline, tmp_path)
    pipeline_latents = []
    for strength in (0.6, 1.0):
        with drawing(monkeypatch, extra_noise(3, "posterior", *SHAPE), first_noise(3, *SHAPE)):
            theirs = pipeline(
                PROMPT,
                image=PHOTO,
                strength=strength,
                num_inference_steps=7,
                guidance_scale=scale,
                output_type="latent",
            ).images
        ours = latents_of(
            model,
            prompt=PROMPT,
            image=PHOTO,
            strength=strength,
            strength_rule="diffusers",
            steps=7,
            guidance_scale=scale,
            width=16,
            height=32,
            seed=3,
        )
        close(ours, theirs)
        pipeline_latents.append(theirs)
    monkeypatch.setattr(images, "to_pixels", lambda image: TO_PIXELS(image) * 0.8)
    model.picture_cache = Cache(4)  # a little less contrast must show
    request = {"image": PHOTO, "strength": 0.6, "strength_rule": "diffusers", "steps": 7}
    request |= {"guidance_scale": scale, "width": 16, "height": 32, "seed": 3}
    right, wrong = pipeline_latents[0], latents_of(model, prompt=PROMPT, **request)
    with pytest.raises(AssertionError):
        close(wrong, right)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting_is_the_references(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    scale: float,
    channels: int,
) -> None:
    pipeline = inpaint_pipeline(sampler, channels)
    model = loaded(pipeline, tmp_path)
    assert model.spec.family == ("inpaint" if channels == 9 else "sd-v1")
    for strength in (1.0, 0.6):
        draws = [
            first_noise(3, *SHAPE),
            extra_noise(3, "masked-posterior", *SHAPE),
        ]
        if channels == 4 or strength < 1:
            draws.insert(0, extra_noise(3, "posterior", *SHAPE))
        with drawing(monkeypatch, *draws):
            theirs = pipeline(
                PROMPT,
                image=PHOTO,
                mask_image=MASK,
                height=32,
                width=16,
                strength=strength,
                num_inference_steps=7,
                guidance_scale=scale,
                output_type="latent",
            ).images
        ours = latents_of(
            model,
            prompt=PROMPT,
            image=PHOTO,
            mask=MASK,
            strength=strength,
            strength_rule="diffusers",
            steps=7,
            guidance_scale=scale,
            width=16,
            height=32,
            seed=3,
        )
        close(ours, theirs)
    taller = MASK.copy()  # a row of cells more must show
    taller.paste(255, (0, 8, 16, 10))
    request = {"prompt": PROMPT, "image": PHOTO, "mask": taller, "strength": 0.6, "steps": 7}
    request |= {"strength_rule": "diffusers", "guidance_scale": scale, "seed": 3}
    wrong = latents_of(model, width=16, height=32, **request)
    with pytest.raises(AssertionError):
        close(wrong, theirs)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_depth_is_the_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, scale: float
) -> None:
    pipeline = depth_pipeline(sampler)
    model = loaded(pipeline, tmp_path)
    assert model.spec.family == "depth"
    depth = torch.rand(1, 40, 24, generator=torch.Generator().manual_seed(0)) * 900
    with drawing(monkeypatch, extra_noise(3, "posterior", *SHAPE), first_noise(3, *SHAPE)):
        theirs = pipeline(
            PROMPT,
            image=PHOTO,
            depth_map=depth,
            strength=0.8,
            num_inference_steps=7,
            guidance_scale=scale,
            output_type="latent",
        ).images
    given: dict[str, Any] = {"prompt": PROMPT, "image": PHOTO, "width": 16, "height": 32, "seed": 3}
    given |= {"steps": 7, "guidance_scale": scale, "strength_rule": "diffusers"}
    close(latents_of(model, depth=depth[0].numpy(), **given), theirs)
    other = latents_of(model, depth=depth[0].flip(0).numpy(), **given)
    with pytest.raises(AssertionError):
        close(other, theirs)


def test_the_estimator_reads_what_the_references_reads(tmp_path: Path) -> None:
    estimator, prepare = depth_estimator()
    pipeline = depth_pipeline("ddim", depth_estimator=estimator, feature_extractor=prepare)
    model = loaded(pipeline, tmp_path)
    for size in ((60, 40), (300, 700), (48, 48)):
        pixels = prepare(photo(*size), return_tensors="pt").pixel_values
        ours = planes.depth_pixels(photo(*size))
        assert ours.shape == pixels.shape
        assert float((ours - pixels).abs().max()) < 1e-5
    with torch.no_grad():  # the last one; this kind of estimator takes squares only
        theirs = estimator(pixels).predicted_depth[0]
    close(planes.estimate_depth(model, photo(48, 48)), theirs)
