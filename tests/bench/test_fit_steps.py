"""The way with the least cost, against trying all of them."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from benchmarks.fit_steps import cheapest, walked

from micro_models import micro_model


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
def test_the_cheapest_way_is_that_of_trying_all(steps: int) -> None:
    costs = np.random.default_rng(steps).random((8, 8)) ** 3
    found = cheapest(costs, steps)

    def price(way: tuple[int, ...]) -> float:
        return sum(costs[a, b] for a, b in pairwise(way))

    every = [(0, *inner, 7) for inner in combinations(range(1, 7), steps - 1)]
    assert tuple(found) == min(every, key=price)


def test_costs_are_how_far_a_single_step_misses() -> None:
    sigmas, costs, timesteps = walked(micro_model(), 2, 6)
    assert len(sigmas) == 7
    assert len(timesteps) == 6
    assert sigmas[-1] == 0
    assert np.allclose(np.diag(costs, 1), 0, atol=1e-4), "the fine steps are the trajectory"
    assert (costs[0, 2:] > 0).all()
