"""What every side computes on: numbers of a case, the same in every process, without torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from benchmarks.compare.cases import Case, words

SEED = 7
FIRST = 500.0
"""Timestep of the step whose result is compared."""
LATER = tuple(float(t) for t in range(981, 0, -20))
"""Those of the steps that are timed, from late to early, as a run goes."""


class Inputs(NamedTuple):
    """Float32 throughout."""

    latents: np.ndarray
    """``(B, C, h, w)``, scaled: about unit variance."""
    prompts: np.ndarray
    """``(B, S, W)``."""
    empty: np.ndarray
    """``(1, S, W)``, of the branch without a prompt."""
    pixels: np.ndarray
    """``(B, 3, H, W)`` in [-1, 1]."""


def of(case: Case) -> Inputs:
    """A case's numbers."""
    spec, draw = case.spec, np.random.default_rng(SEED)
    cells, width = case.size // spec.vae.factor, spec.unet.context_width
    shape = (case.batch, spec.unet.in_channels, cells, cells)

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape, dtype=np.float32)

    return Inputs(
        latents=normal(*shape),
        prompts=normal(case.batch, words(spec), width),
        empty=normal(1, words(spec), width),
        pixels=np.clip(normal(case.batch, 3, case.size, case.size) / 2, -1, 1),
    )


def guided(given: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Both branches as one batch, without a prompt first: latents and contexts ``(2B, ...)``."""
    batch = len(given.latents)
    contexts = np.concatenate([np.repeat(given.empty, batch, 0), given.prompts])
    return np.concatenate([given.latents] * 2), contexts
