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
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from PIL import Image
from torch import Tensor

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


def apart(ours: Tensor, theirs: Any) -> float:
    """Largest difference, in units of the reference's largest value or of 1."""
    theirs = torch.as_tensor(theirs)
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


def close(ours: Tensor, theirs: Any, limit: float = 1e-4) -> None:
    difference = apart(ours, theirs)
    assert difference <= limit, difference
