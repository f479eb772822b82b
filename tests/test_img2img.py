"""From a picture: the reference's rule of strength, and ours; inpainting, both ways; depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image

from systems_micro import (
    SAMPLERS,
    close,
    drawing,
    extra_noise,
    first_noise,
    latents_of,
    loaded,
    make_text,
    make_tokenizer,
    make_unet,
    make_vae,
    photo,
    schedulers,
)

PROMPT = "abc on top of xyz"
SHAPE = (1, 4, 16, 8)  # of latents; the micro autoencoder halves
PHOTO = photo(16, 32)
MASK = Image.fromarray(
    np.kron([[0, 255], [255, 0], [255, 255], [0, 0]], np.ones((8, 8))).astype("u1")
)


def parts(sampler: str, **unet: Any) -> dict[str, Any]:
    return {
        "unet": make_unet(**unet),
        "vae": make_vae(),
        "text_encoder": make_text(),
        "tokenizer": make_tokenizer(),
        "scheduler": schedulers()[sampler],
    }


UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image_is_the_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, scale: float
) -> None:
    pipeline = StableDiffusionImg2ImgPipeline(**parts(sampler), **UNCHECKED)
    model = loaded(pipeline, tmp_path)
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
    pipeline = StableDiffusionInpaintPipeline(**parts(sampler, in_channels=channels), **UNCHECKED)
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


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_depth_is_the_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, scale: float
) -> None:
    pipeline = StableDiffusionDepth2ImgPipeline(
        **parts(sampler, in_channels=5), depth_estimator=None, feature_extractor=None
    )
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
