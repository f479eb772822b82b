"""A micro model as diffusers writes it, a few pictures, and recipes that personalise it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DDIMScheduler
from PIL import Image

from safelight.generate import Generator
from safelight.model import Model
from safelight.train.recipe import Recipe
from store.store_micro import make_pipeline

PROMPT, CLASS = "a zq cat", "a cat"


def write_model(folder: Path) -> Path:
    """The micro pipeline: pictures of 16x16, epsilon-prediction."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    make_pipeline(scheduler).save_pretrained(folder)
    return folder


def write_pictures(folder: Path, count: int = 3, seed: int = 0) -> Path:
    """Noise with large patches, so that pictures differ at any size."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for k in range(count):
        patches = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(patches).resize((20, 16), Image.Resampling.NEAREST).save(
            folder / f"{k:03d}.png"
        )
    return folder


def recipe(output: Path, model: Path, pictures: Path, **settings: Any) -> Recipe:
    """Four steps of two pictures."""
    top = {k: settings.pop(k) for k in ("steps", "seed", "precision") if k in settings}
    optim = {"batch": 2, "decay": 0.0, "lr": settings.pop("lr", 1e-3)}
    if settings.get("method") == "textual_inversion":
        personal = {"token": "<zq>", "initializer": "a"}
    else:
        personal = {"instance_prompt": PROMPT}
    return Recipe.model_validate(
        {
            "name": "mine",
            "output": output,
            "steps": 4,
            "save_every": 4,
            "sample_every": 10**6,
            "optim": optim,
            "ema": {"decay": 0.0},
            **top,
            "personal": {
                "model": str(model),
                "instance_data": pictures,
                "validation_images": 2,
                **personal,
                **settings,
            },
        }
    )


class Engine:
    """The engine that generates, two steps a picture; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def __call__(
        self, model: Model, prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image | None]:
        self.asked += zip(prompts, seeds, strict=True)
        made = Generator(model).generate(list(prompts), seed=list(seeds), steps=2)
        return [result.image for result in made]
