"""Inpainting by blending: what is kept is kept, and the rest does not notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from safelight.diffusion import grid as grids
from safelight.diffusion import noise as noises
from safelight.diffusion.keep import keep
from safelight.diffusion.schedule import Schedule
from safelight.diffusion.solvers import SOLVERS, add_noise, solve
from safelight.spec import ScheduleSpec

SHAPE = (1, 4, 6, 6)


def drawn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def driven(solver: Any, seen: list[Any] | None = None) -> Tensor:
    """Answers every question with noise of its own, whatever it is shown."""
    try:
        ask = next(solver)
        while True:
            if seen is not None:
                seen.append(ask)
            ask = solver.send(drawn(100 + ask.index))
    except StopIteration as end:
        return end.value


@pytest.mark.parametrize("kind", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_kept_part_stays_and_the_rest_does_not_notice(name: str, kind: Any) -> None:
    schedule = Schedule.from_spec(ScheduleSpec(prediction_type=kind))
    plan = grids.timesteps(schedule, 8, sampler=name).start_at(0)
    image, mask = drawn(1), torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    mask[..., :3] = 1
    start = add_noise(image, drawn(2), plan.start_sigma)

    def run() -> Any:
        return solve(name, start, schedule, plan, noise=noises.step_noise(5, SHAPE))

    seen: list[Any] = []
    held = driven(keep(run(), image, mask, drawn(2)), seen)
    free = driven(run())
    assert torch.allclose(held[..., 3:], image[..., 3:])
    assert torch.allclose(held[..., :3], free[..., :3])
    assert not torch.allclose(free[..., 3:], image[..., 3:], atol=0.1)
    for ask in seen:  # on its way it is the image with the first noise
        path = add_noise(image, drawn(2), ask.sigma)
        assert torch.allclose(ask.x[..., 3:], path[..., 3:])


def test_a_soft_mask_is_a_mixture() -> None:
    schedule = Schedule.from_spec(ScheduleSpec())
    plan = grids.timesteps(schedule, 4, sampler="ddim").start_at(0)
    image = drawn(1)
    start = add_noise(image, drawn(2), plan.start_sigma)
    half = torch.full((1, 1, 6, 6), 0.5, dtype=torch.float64)
    made = driven(keep(solve("ddim", start, schedule, plan), image, half, drawn(2)))
    free = driven(solve("ddim", start, schedule, plan))
    assert 0.1 < float((made - image).abs().mean() / (free - image).abs().mean()) < 0.9


def test_closing_closes_what_is_inside() -> None:
    schedule = Schedule.from_spec(ScheduleSpec())
    plan = grids.timesteps(schedule, 4, sampler="ddim")
    inner = solve("ddim", drawn(1), schedule, plan)
    outer = keep(inner, drawn(2), torch.ones(1, 1, 6, 6), drawn(3))
    next(outer)
    outer.close()
    with pytest.raises(StopIteration):
        next(inner)
