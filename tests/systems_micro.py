"""The reference's pipelines at micro size, and noise that both sides share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    PriorTransformer,
    StableDiffusionImageVariationPipeline,
    StableUnCLIPImg2ImgPipeline,
    StableUnCLIPPipeline,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPTextModelWithProjection

from safelight.diffusion import noise
from safelight.engine import Engine
from safelight.generate.course import picture, plot
from safelight.model import Model
from safelight.request import GenerateRequest

sys.path.insert(0, str(Path(__file__).parent / "store"))
from store_micro import (  # noqa: F401
    make_pipeline,
    make_text,
    make_tokenizer,
    make_unet,
    make_vae,
    make_vision,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedulers(**changes: Any) -> dict[str, Any]:
    """Four published samplers."""
    betas = {**BETAS, **changes}
    one = {"steps_offset": 1}
    return {
        "ddim": DDIMScheduler(**betas, **one, clip_sample=False, set_alpha_to_one=False),
        "pndm": PNDMScheduler(**betas, **one, skip_prk_steps=True),
        "dpm": DPMSolverMultistepScheduler(**betas, **one),
        "euler": EulerDiscreteScheduler(**betas, **one),
    }


SAMPLERS = ("ddim", "pndm", "dpm", "euler")


def loaded(pipeline: Any, folder: Path, **options: Any) -> Model:
    """The reference's pipeline, through its folder."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return Model.load(folder, device="cpu", **options)


def latents_of(model: Model, **arguments: Any) -> Tensor:
    """Our latents of one picture."""
    request = GenerateRequest.from_kwargs(**arguments).resolved(model.spec)
    course = plot(model, request)
    made = picture(model, request, course)
    Engine(model).run([made])
    return made.result()


@contextmanager
def drawing(monkeypatch: pytest.MonkeyPatch, *draws: Tensor) -> Iterator[None]:
    """The reference draws these, in this order, and no others."""
    left = list(draws)

    def drawn(shape: Any, *_: Any, **__: Any) -> Tensor:
        assert left, f"another draw, of {tuple(shape)}"
        assert tuple(left[0].shape) == tuple(shape)
        return left.pop(0).clone()

    with monkeypatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("diffusers.") and "randn_tensor" in vars(module):
                patch.setattr(module, "randn_tensor", drawn)
        yield
    assert not left, f"{len(left)} draws were not asked for"


def first_noise(seed: int, *shape: int) -> Tensor:
    return noise.initial_noise(seed, shape)


def extra_noise(seed: int, name: str, *shape: int) -> Tensor:
    return noise.stream(seed, shape, name)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours."""
    values = np.random.default_rng(seed).random((4, 4, 3)) * 255
    return Image.fromarray(values.astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def close(ours: Tensor, theirs: Any, limit: float = 1e-4) -> None:
    theirs = torch.as_tensor(theirs)
    assert ours.shape == theirs.shape
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
    assert difference <= limit, difference


# -- pipelines that look at a picture --------------------------------------------------------------

WIDTH = 12  # of picture embeddings
CLIP = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
NOISING = {"beta_schedule": "squaredcos_cap_v2"}


def variations_pipeline(sampler: str) -> StableDiffusionImageVariationPipeline:
    return StableDiffusionImageVariationPipeline(
        unet=make_unet(),
        vae=make_vae(),
        image_encoder=make_vision(),
        scheduler=schedulers()[sampler],
        safety_checker=None,
        feature_extractor=CLIP,
        requires_safety_checker=False,
    )


def unclip_parts(sampler: str) -> dict[str, Any]:
    torch.manual_seed(5)
    normalizer = StableUnCLIPImageNormalizer(WIDTH)
    normalizer.mean.data.normal_()
    normalizer.std.data.uniform_(0.5, 2)
    return {
        "image_normalizer": normalizer,
        "image_noising_scheduler": DDPMScheduler(**NOISING),
        "tokenizer": make_tokenizer(),
        "text_encoder": make_text(),
        "unet": make_unet(
            class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH
        ),
        "scheduler": schedulers(prediction_type="v_prediction")[sampler],
        "vae": make_vae(),
    }


def unclip_pipeline(sampler: str) -> StableUnCLIPImg2ImgPipeline:
    return StableUnCLIPImg2ImgPipeline(
        **unclip_parts(sampler), feature_extractor=CLIP, image_encoder=make_vision()
    )


def prior_text() -> CLIPTextModelWithProjection:
    config = make_text().config
    config.projection_dim = WIDTH
    torch.manual_seed(6)
    return CLIPTextModelWithProjection(config).eval()


def prior_pipeline(sampler: str) -> StableUnCLIPPipeline:
    torch.manual_seed(7)
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=WIDTH,
        num_embeddings=16,
        additional_embeddings=4,
    )
    for name in ("positional_embedding", "prd_embedding", "clip_mean"):
        getattr(prior, name).data.normal_()
    prior.clip_std.data.uniform_(0.5, 2)
    return StableUnCLIPPipeline(
        **unclip_parts(sampler),
        prior_tokenizer=make_tokenizer(),
        prior_text_encoder=prior_text(),
        prior=prior.eval(),
        prior_scheduler=DDPMScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            clip_sample_range=5.0,
            **NOISING,
        ),
    )
