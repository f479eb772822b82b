"""The systems of the five cards, as :mod:`benchmarks.systems` runs them.

Each has a maker of the reference's micro pipeline, what is asked of both sides, and the noise that
both are handed. The makers are those of the tests.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight import presets
from safelight.model import Model
from safelight.spec import ModelSpec

TESTS = Path(__file__).parents[1] / "tests"
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))  # the reference's micro pipelines are made there

import reference_pipelines as reference  # noqa: E402
import safety_micro  # noqa: E402
from systems_micro import extra_noise, first_noise, photo  # noqa: E402

SEED, STEPS = 3, 7
SIZE = {"width": 16, "height": 32}
SHAPE = (1, 4, 16, 8)  # of latents; the micro autoencoder halves
PROMPT = "abc on top of xyz"
PHOTO = photo(16, 32)
MASK = Image.fromarray(
    np.kron([[0, 255], [255, 0], [255, 255], [0, 0]], np.ones((8, 8))).astype("u1")
)
DEPTH = torch.rand(1, 40, 24, generator=torch.Generator().manual_seed(0)) * 900
PRIOR = {"prior_guidance_scale": 4.0}
DIFFUSERS = {"strength_rule": "diffusers"}


@dataclass(frozen=True)
class System:
    """One row of the table.

    Attributes:
        peer: the reference's pipeline class.
        preset: the system at its published size.
        make: its micro pipeline, on a sampler.
        theirs, ours: what is asked, in each side's words, beside steps, guidance and seed.
        draws: the noise that the reference takes, in its order.
        told: what the published single file says beside its tensors.
        prepare: makes the saved folder what it was when published.
        beside: what the reference's pipeline needs and no single file has.
        checked: it has a safety checker, whose verdicts are compared too.
    """

    name: str
    peer: type
    preset: ModelSpec
    make: Callable[[str], Any]
    theirs: dict[str, Any]
    ours: dict[str, Any]
    draws: Callable[[Model], list[Tensor]] = field(default=lambda model: [start()])
    told: dict[str, Any] | None = None
    prepare: Callable[[Path, Any], None] = field(default=lambda folder, pipeline: None)
    beside: dict[str, Any] = field(default_factory=dict)
    checked: bool = False


def start() -> Tensor:
    return first_noise(SEED, *SHAPE)


def others(*names: str) -> list[Tensor]:
    return [extra_noise(SEED, name, *SHAPE) for name in names]


def embedding_noise() -> Tensor:
    return extra_noise(SEED, "embedding", reference.WIDTH)[None]


@functools.cache
def checked_pipeline(sampler: str) -> Any:
    """With a checker whose thresholds flag half of what the pipeline makes."""
    made = reference.text_pipeline(sampler, layers_per_block=2)
    made.set_progress_bar_config(disable=True)
    asked = {**SIZE, "num_inference_steps": 3, "guidance_scale": 5.0}
    pictures = [
        made(f"abc {seed}", **asked, generator=torch.Generator().manual_seed(seed)).images[0]
        for seed in range(8)
    ]
    checker = safety_micro.reference()
    safety_micro.flag_half(checker, pictures)
    made.register_modules(safety_checker=checker, feature_extractor=safety_micro.processor())
    return made


def depth_pipeline(sampler: str) -> Any:
    estimator, prepare = reference.depth_estimator()
    return reference.depth_pipeline(
        sampler, v2=True, depth_estimator=estimator, feature_extractor=prepare
    )


TEXT = {"prompt": PROMPT, **SIZE}
WORDS = {**TEXT, "negative_prompt": "no"}
FROM = {"prompt": PROMPT, "image": PHOTO, "strength": 0.6}
HOLE = {**TEXT, "image": PHOTO}

SYSTEMS = (
    System(
        "v1, text to image",
        diffusers.StableDiffusionPipeline,
        presets.SD_V1,
        lambda sampler: reference.text_pipeline(sampler, layers_per_block=2),
        WORDS,
        WORDS,
    ),
    System(
        "v1, image to image",
        diffusers.StableDiffusionImg2ImgPipeline,
        presets.SD_V1,
        reference.img2img_pipeline,
        FROM,
        {**FROM, **SIZE, **DIFFUSERS},
        lambda model: [*others("posterior"), start()],
    ),
    System(
        "v1-5 with its safety checker",
        diffusers.StableDiffusionPipeline,
        presets.SD_V1,
        checked_pipeline,
        TEXT,
        TEXT,
        checked=True,
    ),
    System(
        "image variations, first revision (a whole CLIP)",
        diffusers.StableDiffusionImageVariationPipeline,
        presets.IMAGE_VARIATIONS,
        reference.variations_pipeline,
        {"image": PHOTO, **SIZE},
        {"image": PHOTO, **SIZE},
        prepare=lambda folder, pipeline: reference.as_first_revision(
            folder, pipeline.image_encoder
        ),
    ),
    System(
        "image variations, second revision (a vision tower)",
        diffusers.StableDiffusionImageVariationPipeline,
        presets.IMAGE_VARIATIONS,
        reference.variations_pipeline,
        {"image": PHOTO, **SIZE},
        {"image": PHOTO, **SIZE},
    ),
    System(
        "v2 base, predicts the noise",
        diffusers.StableDiffusionPipeline,
        presets.SD_V2_BASE,
        lambda sampler: reference.text_pipeline(sampler, v2=True, layers_per_block=2),
        WORDS,
        WORDS,
        told={"global_step": 875000},
    ),
    System(
        "v2 and v2.1 at 768, predict v",
        diffusers.StableDiffusionPipeline,
        presets.SD_V2_768,
        lambda sampler: reference.text_pipeline(
            sampler, v2=True, prediction="v_prediction", layers_per_block=2
        ),
        WORDS,
        WORDS,
        told={"global_step": 110000},
    ),
    System(
        "unCLIP h",
        diffusers.StableUnCLIPImg2ImgPipeline,
        presets.UNCLIP_H,
        lambda sampler: reference.unclip_pipeline(sampler, statistics=False, v2=True),
        {**HOLE, "noise_level": 0},
        {**HOLE, "noise_level": 0},
        lambda model: [embedding_noise(), start()],
    ),
    System(
        "unCLIP l",
        diffusers.StableUnCLIPImg2ImgPipeline,
        presets.UNCLIP_L,
        lambda sampler: reference.unclip_pipeline(sampler, v2=True),
        {**HOLE, "noise_level": 700},
        {**HOLE, "noise_level": 700},
        lambda model: [embedding_noise(), start()],
    ),
    System(
        "unCLIP l with the prior",
        diffusers.StableUnCLIPPipeline,
        presets.UNCLIP_L_PRIOR,
        lambda sampler: reference.prior_pipeline(sampler, head_width=64, v2=True),
        {**TEXT, **PRIOR, "prior_num_inference_steps": 6},
        {**TEXT, **PRIOR, "prior_steps": 6},
        lambda model: [
            extra_noise(SEED, "prior", 1, reference.WIDTH),
            *reference.prior_noises(model, SEED, 6),
            embedding_noise(),
            start(),
        ],
    ),
    System(
        "depth",
        diffusers.StableDiffusionDepth2ImgPipeline,
        presets.SD_V2_DEPTH,
        depth_pipeline,
        {**FROM, "depth_map": DEPTH},
        {**FROM, **SIZE, **DIFFUSERS, "depth": DEPTH[0].numpy()},
        lambda model: [*others("posterior"), start()],
        beside={"depth_estimator": None, "feature_extractor": None},
    ),
    System(
        "inpainting, 9 channels",
        diffusers.StableDiffusionInpaintPipeline,
        presets.SD_V2_INPAINT,
        lambda sampler: reference.inpaint_pipeline(sampler, 9, v2=True),
        {**HOLE, "mask_image": MASK, "strength": 1.0},
        {**HOLE, "mask": MASK, "strength": 1.0, **DIFFUSERS},
        lambda model: [start(), *others("masked-posterior")],
    ),
    System(
        "inpainting, 4 channels (blending)",
        diffusers.StableDiffusionInpaintPipeline,
        presets.SD_V1,
        lambda sampler: reference.inpaint_pipeline(sampler, 4),
        {**HOLE, "mask_image": MASK, "strength": 0.6},
        {**HOLE, "mask": MASK, "strength": 0.6, **DIFFUSERS},
        lambda model: [*others("posterior"), start(), *others("masked-posterior")],
    ),
    System(
        "x4 upscaler",
        diffusers.StableDiffusionUpscalePipeline,
        presets.X4_UPSCALER,
        lambda sampler: reference.upscale_pipeline(sampler, v2=True),
        {"prompt": PROMPT, "image": photo(8, 16), "noise_level": 20},
        {"prompt": PROMPT, "image": photo(8, 16), "noise_level": 20},
        lambda model: [extra_noise(SEED, "low-resolution", 1, 3, 16, 8), start()],
    ),
    System(
        "small",
        diffusers.StableDiffusionPipeline,
        presets.SD_SMALL,
        reference.text_pipeline,
        WORDS,
        WORDS,
    ),
)
