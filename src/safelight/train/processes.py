"""The processes that share a run: one alone, or those that ``torchrun`` or ``accelerate launch``
started.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState

from safelight.errors import SafelightError
from safelight.train.recipe import Recipe

PATIENCE = timedelta(hours=2)
"""How long processes wait for one: to compute latents, to validate, to draw samples. A process
that is gone is noticed by its launcher at once, so this is no time that is lost."""


def this_process() -> PartialState:
    """Which process this is; joins the others, where there are some."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def own_device() -> torch.device:
    """Where this process computes: with several accelerators, the one that is its own."""
    device = this_process().device
    assert device is not None
    return device


def accelerator_of(recipe: Recipe) -> Accelerator:
    """accelerate, as a recipe wants it; it reads what its launcher says from the environment."""
    return Accelerator(
        mixed_precision="bf16" if recipe.precision == "bfloat16" else "no",
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def check_agreement(accelerator: Accelerator, seen: int, folder: Path) -> None:
    """See that all processes go on from the same picture.

    Raises:
        SafelightError: they do not: they look into different folders.
    """
    if accelerator.num_processes == 1:
        return
    mine = torch.tensor([seen], device=accelerator.device)
    found: list[int] = accelerator.gather(mine).tolist()  # type: ignore[union-attr]
    if len(set(found)) > 1:
        raise SafelightError(
            f"{folder}: processes found different checkpoints, after {sorted(set(found))} "
            "pictures. The output folder has to lie on storage that all nodes share."
        )
