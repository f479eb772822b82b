"""Drivers and closed-form truths that the tests of ``diffusion/`` share."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from safelight.diffusion import prediction, solvers
from safelight.diffusion.grid import Grid
from safelight.diffusion.schedule import Schedule, rates


def drive(
    solver: solvers.Solver, network: Callable[[solvers.Ask], Tensor]
) -> tuple[Tensor, list[solvers.Ask]]:
    """Answer every question; the final sample and the questions."""
    asked: list[solvers.Ask] = []
    try:
        ask = next(solver)
        while True:
            asked.append(ask)
            ask = solver.send(network(ask))
    except StopIteration as end:
        return end.value, asked


def run(
    name: str, x: Tensor, schedule: Schedule, grid: Grid, network: Callable, **options
) -> Tensor:
    return drive(solvers.solve(name, x, schedule, grid, **options), network)[0]


def answer(kind: str, x: Tensor, x0: Tensor, sigma: float) -> Tensor:
    """The prediction of ``kind`` that says ``x0`` at VP latents ``x`` of level ``sigma``."""
    a, s = rates(sigma)
    if kind == "x0":
        return x0
    eps = (x - a * x0) / s
    return eps if kind == "epsilon" else a * eps - s * x0


class Mixture:
    """Equal-weight Gaussian mixture in one dimension, every element of a tensor a sample.

    Its ideal denoiser is known: ``E[x0 | x]`` is a softmax-weighted sum of per-component posterior
    means.
    """

    def __init__(self, means=(-1.0, 1.0), std: float = 0.3) -> None:
        self.means = torch.tensor(means, dtype=torch.float64)
        self.var = std**2

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        a, s = rates(sigma)
        total = a**2 * self.var + s**2
        gap = x.double()[..., None] - a * self.means
        weight = torch.softmax(-(gap**2) / (2 * total), dim=-1)
        mean = self.means + a * self.var / total * gap
        return (weight * mean).sum(-1)

    def network(self, kind: str) -> Callable[[solvers.Ask], Tensor]:
        def reply(ask: solvers.Ask) -> Tensor:
            x = ask.x.double()
            return answer(kind, x, self.denoise(x, ask.sigma), ask.sigma).to(ask.x.dtype)

        return reply

    def flow(self, x: Tensor, sigmas: list[float]) -> Tensor:
        """The probability-flow ODE from ``sigmas[0]``, by RK4 in float64 through ``sigmas``; VP in,
        x0 out (the last entry is near 0)."""
        y = x.double() / rates(sigmas[0])[0]

        def slope(y: Tensor, sigma: float) -> Tensor:
            return (y - self.denoise(y * rates(sigma)[0], sigma)) / sigma

        for high, low in pairwise(sigmas):
            h = low - high
            k1 = slope(y, high)
            k2 = slope(y + h / 2 * k1, high + h / 2)
            k3 = slope(y + h / 2 * k2, high + h / 2)
            k4 = slope(y + h * k3, low)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y


def relative(ours: Tensor, theirs: Tensor) -> float:
    """``|ours - theirs| / |theirs|``, both norms Euclidean over all elements."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm())


__all__ = ["Mixture", "answer", "drive", "prediction", "relative", "run"]
