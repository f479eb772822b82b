"""A run on pictures of many shapes, for tests of buckets and of processes that share a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from safelight.train.latent import LatentDiffusionObjective
from safelight.train.recipe import Recipe
from safelight.train.rehearsal import WIDTH, small_parts

SHAPES = [(48, 48)] * 5 + [(96, 24)] * 5 + [(30, 80)] * 4 + [(70, 40)] * 3 + [(47, 20)]


def make_album(folder: Path) -> Path:
    """18 pictures of five shapes, each of a shade of its own, with captions; one is broken."""
    folder.mkdir()
    for k, (width, height) in enumerate(SHAPES):
        shade = np.full((height, width, 3), 14 * k, np.uint8)
        Image.fromarray(shade).save(folder / f"{k:02}.png")
        (folder / f"{k:02}.txt").write_text(f"shade {k}")
    (folder / "18.png").write_bytes(b"no picture")
    return folder


def fields(album: Path, output: Path, **changes: Any) -> dict[str, Any]:
    channels = {"inpaint": 9}.get(changes.get("task", ""), 4)
    return {
        "name": "many-shapes",
        "output": output,
        "images": 64,
        "save_every": 24,
        "sample_every": 64,
        "seed": 3,
        "data": {
            "source": str(album),
            "size": 32,
            "hold_out": 0.0,
            "cache": output / "cache",
            "buckets": {"step": 16},
        },
        "optim": {"batch": 2, "processes": 2, "lr": 1e-3},
        "diffusion": {
            "clip": "none",
            "vae": "none",
            "unet": {
                "in_channels": channels,
                "channels": [8, 8],
                "attention": [True, True],
                "heads": [1, 1],
                "only_cross_attention": [False, False],
                "layers_per_block": 1,
                "context_width": WIDTH,
                "norm_groups": 4,
                "sample_size": 4,
                **changes.pop("unet", {}),
            },
            **changes,
        },
    }


def objective(album: Path, output: Path, **changes: Any) -> Any:
    recipe = Recipe.model_validate(fields(album, output, **changes))
    torch.manual_seed(0)  # the same frozen networks every time
    return LatentDiffusionObjective(recipe, frozen=small_parts(32, 8))
