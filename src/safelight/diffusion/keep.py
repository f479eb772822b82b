"""Inpainting with a model that has never learnt it: the kept part of a picture is held to itself.

Lugmayr et al. 2022, "RePaint", Eq. 8, without its resampling: after every step the known part,
with one noise brought to each level, is put back into the sample. A solver keeps its sample to
itself and treats each cell by itself, so here the *question* is asked with the known part in place,
and the *answer* becomes, there, the one whose x0 is the picture: the same samples, and where a soft
mask keeps some of a cell, the sample is drawn towards the picture by as much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import torch
from torch import Tensor

from safelight.diffusion import prediction
from safelight.diffusion.schedule import rates
from safelight.diffusion.solvers.base import Ask, Solver


def keep(
    solver: Solver, image: Tensor, mask: Tensor, noise: Tensor, first: Tensor | None = None
) -> Solver:
    """A solver's run that repaints the mask and keeps the rest.

    Args:
        solver: started, where the picture is kept, on the noised image.
        image: x0 latents to keep, of the solver's shape.
        mask: 1 is repainted, 0 kept; broadcasts against ``image``.
        noise: what the image is noised with, at every level.
        first: what the network is shown at the first call instead, in VP scale: the reference
            shows it pure noise where the strength is 1.

    Returns:
        a solver that asks what ``solver`` asks and returns its last sample, the kept part exact.
    """
    image, mask = prediction.working(image), prediction.working(mask)
    return _keep(solver, image, mask, prediction.working(noise), first)


def _keep(
    solver: Solver, image: Tensor, mask: Tensor, noise: Tensor, first: Tensor | None
) -> Generator[Ask, Tensor, Tensor]:
    try:
        ask = next(solver)
        while True:
            a, s = rates(ask.sigma)
            shown = torch.where(mask > 0, ask.x, (a * image + s * noise).to(ask.x.dtype))
            if first is not None:
                shown, first = first.to(ask.x.dtype), None
            answer = yield dataclasses.replace(ask, x=shown)
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
