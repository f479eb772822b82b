"""Systems that look at a picture: image variations, unCLIP with and without the prior, x4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reference_pipelines import (
    CLIP,
    WIDTH,
    as_first_revision,
    prior_noises,
    prior_pipeline,
    unclip_pipeline,
    upscale_pipeline,
    variations_pipeline,
)
from safelight.conditioning import image as images
from safelight.errors import InvalidRequest, WeightsError
from safelight.model import Model
from systems_micro import (
    SAMPLERS,
    close,
    drawing,
    extra_noise,
    first_noise,
    latents_of,
    loaded,
    make_unet,
    photo,
)

PROMPT = "abc on top of xyz"
SHAPE = (1, 4, 16, 8)
PHOTO = photo(40, 24)
SIZE = {"width": 16, "height": 32}


# -- image variations ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_variations_are_the_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, scale: float
) -> None:
    pipeline = variations_pipeline(sampler)
    model = loaded(pipeline, tmp_path)
    assert model.spec.family == "image-variations"
    with drawing(monkeypatch, first_noise(3, *SHAPE)):
        theirs = pipeline(
            PHOTO, **SIZE, num_inference_steps=7, guidance_scale=scale, output_type="latent"
        ).images
    given: dict[str, Any] = {**SIZE, "steps": 7, "guidance_scale": scale, "seed": 3}
    close(latents_of(model, image=PHOTO, **given), theirs)
    close(latents_of(model, images=[PHOTO, PHOTO], **given), theirs)
    with torch.no_grad():
        pixels = CLIP(PHOTO, return_tensors="pt").pixel_values
        embedding = pipeline.image_encoder(pixels).image_embeds
    close(latents_of(model, image_embedding=embedding, **given), theirs)
    with pytest.raises(AssertionError):
        close(latents_of(model, image=PHOTO.rotate(180), **given), theirs)


def test_the_first_revision_holds_a_whole_clip(tmp_path: Path) -> None:
    pipeline = variations_pipeline("pndm")
    model = loaded(pipeline, tmp_path)
    as_first_revision(tmp_path, pipeline.image_encoder)
    first = Model.load(tmp_path, device="cpu")
    given: dict[str, Any] = {"image": PHOTO, "steps": 3, "seed": 3, **SIZE}
    assert torch.equal(latents_of(first, **given), latents_of(model, **given))


@pytest.mark.parametrize("size", [(40, 24), (16, 16), (23, 57), (500, 333), (10, 9)])
def test_clip_sees_what_the_published_processor_makes(size: tuple[int, int]) -> None:
    theirs = CLIP(photo(*size), return_tensors="pt").pixel_values
    ours = images.clip_pixels(photo(*size), 16)
    assert float((ours - theirs).abs().max()) < 1e-5
    square = images.clip_pixels(photo(*size), 16, "square")
    assert square.shape == theirs.shape
    assert size == (16, 16) or float((square - theirs).abs().max()) > 0.01


# -- unCLIP ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_unclip_is_the_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, scale: float
) -> None:
    pipeline = unclip_pipeline(sampler)
    model = loaded(pipeline, tmp_path)
    assert model.spec.family == "unclip"
    assert model.normaliser is not None
    for level in (0, 700):
        with drawing(
            monkeypatch,
            extra_noise(3, "embedding", WIDTH)[None],
            first_noise(3, *SHAPE),
        ):
            theirs = pipeline(
                PHOTO,
                PROMPT,
                **SIZE,
                num_inference_steps=7,
                guidance_scale=scale,
                noise_level=level,
                output_type="latent",
            ).images
        given: dict[str, Any] = {"prompt": PROMPT, "image": PHOTO, "seed": 3, **SIZE}
        given |= {"steps": 7, "guidance_scale": scale}
        close(latents_of(model, noise_level=level, **given), theirs)
    with pytest.raises(AssertionError):
        close(latents_of(model, noise_level=690, **given), theirs)


def test_pictures_are_mixed_by_their_weights(tmp_path: Path) -> None:
    model = loaded(unclip_pipeline("ddim"), tmp_path)
    given: dict[str, Any] = {"prompt": PROMPT, "steps": 3, "seed": 3, **SIZE}
    two = [PHOTO, photo(24, 24, 1)]
    rows = [images.embed(model, [each]) for each in two]
    mixed = latents_of(model, images=two, image_weights=[1, 3], **given)
    close(mixed, latents_of(model, image_embedding=rows[0] / 4 + rows[1] * 3 / 4, **given), 1e-5)
    alone = latents_of(model, images=two, image_weights=[1, 0], **given)
    close(alone, latents_of(model, image=PHOTO, **given), 1e-5)
    with pytest.raises(AssertionError):
        close(mixed, alone)


# -- the prior -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler"])
def test_the_prior_chain_is_the_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, scale: float
) -> None:
    pipeline = prior_pipeline(sampler)
    model = loaded(pipeline, tmp_path)
    assert model.prior is not None
    steps = prior_noises(model, 3, 6)
    with drawing(
        monkeypatch,
        extra_noise(3, "prior", 1, WIDTH),
        *steps,
        extra_noise(3, "embedding", WIDTH)[None],
        first_noise(3, *SHAPE),
    ):
        theirs = pipeline(
            PROMPT,
            **SIZE,
            num_inference_steps=7,
            guidance_scale=scale,
            prior_num_inference_steps=6,
            prior_guidance_scale=scale,
            output_type="latent",
        ).images
    ours = latents_of(
        model,
        prompt=PROMPT,
        steps=7,
        guidance_scale=scale,
        prior_steps=6,
        prior_guidance_scale=scale,
        seed=3,
        **SIZE,
    )
    close(ours, theirs)


def test_a_prior_of_karlos_layout_goes_in_front(tmp_path: Path) -> None:
    whole = loaded(prior_pipeline("ddim"), tmp_path / "whole")
    karlo = tmp_path / "karlo"
    karlo.mkdir()
    for ours, theirs in (
        ("prior", "prior"),
        ("prior_text_encoder", "text_encoder"),
        ("prior_tokenizer", "tokenizer"),
        ("prior_scheduler", "prior_scheduler"),
    ):
        (tmp_path / "whole" / ours).rename(karlo / theirs)
    config = json.loads((karlo / "prior_scheduler" / "scheduler_config.json").read_text())
    config = {
        "_class_name": "UnCLIPScheduler",
        **{k: config[k] for k in ("clip_sample", "clip_sample_range", "prediction_type")},
        "num_train_timesteps": 1000,
        "variance_type": "fixed_small_log",
    }
    (karlo / "prior_scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    plain = loaded(unclip_pipeline("ddim"), tmp_path / "plain", prior=karlo)
    assert plain.spec.prior is not None
    assert (plain.spec.prior.steps, plain.spec.prior.guidance_scale) == (25, 4.0)
    given: dict[str, Any] = {"prompt": PROMPT, "steps": 3, "seed": 3, **SIZE}
    assert torch.equal(latents_of(plain, **given), latents_of(whole, **given))
    wide = unclip_pipeline("ddim")
    wide.unet = make_unet(class_embed_type="projection", projection_class_embeddings_input_dim=32)
    with pytest.raises(WeightsError, match="different CLIPs"):
        loaded(wide, tmp_path / "wide", prior=karlo)
    with pytest.raises(InvalidRequest, match="prior"):
        Model.load("tiny", device="cpu", prior=karlo)


# -- x4 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_upscaler_is_the_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, scale: float
) -> None:
    pipeline = upscale_pipeline(sampler)
    model = loaded(pipeline, tmp_path)
    assert model.spec.family == "x4-upscaler"
    assert (model.spec.steps, model.spec.guidance_scale, model.spec.noise_level) == (75, 9, 20)
    small, cells = photo(8, 16), (1, 4, 16, 8)
    for level in (20, 350):
        with drawing(
            monkeypatch, extra_noise(3, "low-resolution", 1, 3, 16, 8), first_noise(3, *cells)
        ):
            theirs = pipeline(
                PROMPT,
                small,
                negative_prompt="no",
                num_inference_steps=7,
                guidance_scale=scale,
                noise_level=level,
                output_type="latent",
            ).images
        given: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "no", "image": small}
        given |= {"steps": 7, "guidance_scale": scale, "seed": 3}
        ours = latents_of(model, noise_level=level, **given)
        close(ours, theirs)
    with pytest.raises(AssertionError):
        close(latents_of(model, noise_level=340, **given), theirs)


def test_the_upscaler_makes_four_times_the_size(tmp_path: Path) -> None:
    from safelight.generate import Generator

    generator = Generator(loaded(upscale_pipeline("ddim"), tmp_path))
    (result,) = generator.generate(image=photo(9, 18), steps=2, seed=1)
    assert result.image is not None
    assert result.image.size == (32, 64)
    assert next(generator.model.vae.parameters()).dtype == torch.float32
    with pytest.raises(InvalidRequest, match="noise_level: 351"):
        generator.generate(image=photo(8, 8), noise_level=351)
    values = np.asarray(result.image, dtype=int)
    again = generator.generate(image=photo(9, 18), steps=2, seed=2)[0].image
    assert np.abs(values - np.asarray(again, dtype=int)).max() > 0
    assert isinstance(result.image, Image.Image)
