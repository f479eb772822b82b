"""What every solver shares: the question it asks, and how it reads the answer."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.diffusion import prediction
from safelight.diffusion.grid import Grid
from safelight.diffusion.noise import Noise
from safelight.diffusion.schedule import Schedule, rates
from safelight.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Ask:
    """One question: what does the network predict for ``x`` at ``timestep``?

    Args:
        x: exactly what the network must see: VP latents in the dtype the solver was given.
        timestep: a training timestep; fractional for the ``sigma`` family.
        index, total: this call's number, from 0, and how many there will be.
        sigma: the noise level of ``x`` as the solver counts it.
        prediction_type: what to send back: ``epsilon``, ``v`` or ``x0``.
    """

    x: Tensor
    timestep: float
    index: int
    total: int
    sigma: float
    prediction_type: str

    def denoised(self, pred: Tensor) -> Tensor:
        """The picture (x0) that a prediction implies here: a preview. Float32 or wider."""
        return prediction.x0_from(pred, self.x, *rates(self.sigma), self.prediction_type)


Solver = Generator[Ask, Tensor, Tensor]
"""Yields questions, is sent predictions, returns the final sample."""


@dataclass(frozen=True, slots=True)
class Asker:
    """Numbers the questions of one run and casts them to the network's dtype."""

    dtype: torch.dtype
    total: int
    prediction_type: str

    def __call__(self, x: Tensor, timestep: float, sigma: float, index: int) -> Ask:
        return Ask(x.to(self.dtype), timestep, index, self.total, sigma, self.prediction_type)


def begin(x: Tensor, schedule: Schedule, grid: Grid, calls: int) -> tuple[Tensor, Asker]:
    """The start in working precision and VP scale, and who asks."""
    ask = Asker(x.dtype, calls, schedule.prediction_type)
    return prediction.working(x) * grid.init_scale, ask


def read_x0(pred: Tensor, x: Tensor, sigma: float, kind: str) -> Tensor:
    """x0 from a prediction at VP latents ``x`` of level ``sigma``."""
    return prediction.x0_from(pred, x, *rates(sigma), kind)


def read_eps(pred: Tensor, x: Tensor, sigma: float, kind: str) -> Tensor:
    """The noise from a prediction at VP latents ``x`` of level ``sigma``."""
    return prediction.eps_from(pred, x, *rates(sigma), kind)


def draw(noise: Noise | None, sigma_from: float, sigma_to: float, like: Tensor) -> Tensor:
    """Noise for one step, on the device and in the precision of ``like``."""
    if noise is None:
        raise InvalidRequest("noise", "this solver is stochastic and was given no noise source.")
    drawn = noise(sigma_from, sigma_to).to(like.device, like.dtype)
    if drawn.shape == like.shape:
        return drawn
    if (1, *drawn.shape) == like.shape:  # a source made for one picture serves a batch of one
        return drawn[None]
    raise InvalidRequest(
        "noise", f"the source gives {tuple(drawn.shape)}, the latents are {tuple(like.shape)}."
    )
