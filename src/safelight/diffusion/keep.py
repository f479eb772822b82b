"""Inpainting with a model that has never learnt it: the kept part of a picture is held to itself.

Lugmayr et al. 2022, "RePaint", Eq. 8, without its resampling, puts the known part, noised to each
level, back into the sample after every step. Here the *prediction* is replaced instead: where the
picture is kept, the network's answer becomes the one whose x0 is the picture. A solver is linear in
(x, prediction) cell by cell and exact for a constant noise, so the kept part then stays
``a x0 + s eps`` of its own accord: the same samples, for every solver and a soft mask as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import torch
from torch import Tensor

from safelight.diffusion import prediction
from safelight.diffusion.schedule import rates
from safelight.diffusion.solvers.base import Ask, Solver


def keep(solver: Solver, image: Tensor, mask: Tensor, first: Tensor | None = None) -> Solver:
    """A solver's run that repaints the mask and keeps the rest.

    Args:
        solver: started, where the picture is kept, on the noised image.
        image: x0 latents to keep, of the solver's shape.
        mask: 1 is repainted, 0 kept; broadcasts against ``image``.
        first: what the network is shown at the first call instead, in VP scale: the reference
            shows it pure noise where the strength is 1.

    Returns:
        a solver that asks what ``solver`` asks and returns its last sample, the kept part exact.
    """
    return _keep(solver, prediction.working(image), prediction.working(mask), first)


def _keep(
    solver: Solver, image: Tensor, mask: Tensor, first: Tensor | None
) -> Generator[Ask, Tensor, Tensor]:
    try:
        ask = next(solver)
        if first is not None:
            answer = yield dataclasses.replace(ask, x=first.to(ask.x.dtype))
            known = _telling(image, ask)
            ask = solver.send(torch.lerp(known, prediction.working(answer), mask.to(known)))
        while True:
            answer = yield ask
            known = _telling(image, ask)
            ask = solver.send(torch.lerp(known, prediction.working(answer), mask.to(known)))
    except StopIteration as end:
        return torch.lerp(image, prediction.working(end.value), mask.to(image))
    finally:
        solver.close()


def _telling(image: Tensor, ask: Ask) -> Tensor:
    """The prediction at a question whose x0 is ``image``."""
    a, s = rates(ask.sigma)
    x = prediction.working(ask.x)
    if ask.prediction_type == "x0":
        return image
    noise = (x - a * image) / s
    return noise if ask.prediction_type == "epsilon" else a * noise - s * image
