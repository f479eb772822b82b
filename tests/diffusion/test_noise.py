"""Noise by seed and time: reproducible, independent, and Brownian where it says so."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.diffusion import noise

SHAPE = (4, 16, 16)
LEVELS = st.floats(0, 15)


@given(st.integers(0, noise.MAX_SEED - 100), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_picture_k_of_seed_s_is_picture_0_of_seed_s_plus_k(seed: int, k: int) -> None:
    for make in (noise.step_noise, noise.brownian_noise):
        a, b = make(seed, SHAPE, k)(3.0, 1.0), make(seed + k, SHAPE)(3.0, 1.0)
        assert torch.equal(a, b)
    start = noise.initial_noise(seed, SHAPE, k)
    assert torch.equal(start, noise.initial_noise(seed + k, SHAPE))
    assert not torch.equal(start, noise.initial_noise(seed, SHAPE, k + 1))


def test_small_seeds_are_diffusers_noise_and_large_ones_are_distinct() -> None:
    theirs = torch.randn((1, *SHAPE), generator=torch.Generator("cpu").manual_seed(7))
    assert torch.equal(noise.initial_noise(7, SHAPE), theirs[0])
    # torch's own generator would give the same noise for all of these
    seeds = [7, 7 + 2**32, 7 + 2**33, 7 + 2**62]
    drawn = [noise.initial_noise(seed, SHAPE) for seed in seeds]
    assert len({d.sum().item() for d in drawn}) == len(seeds)
    assert all(abs(float(d.std()) - 1) < 0.1 for d in drawn)
    assert noise.picture_seed(noise.MAX_SEED, 1) == 0
    with pytest.raises(ValueError, match="seed"):
        noise.initial_noise(-1, SHAPE)


def test_step_noise_is_keyed_by_time_and_nothing_else() -> None:
    source = noise.step_noise(5, SHAPE)
    first = source(2.0, 1.0)
    others = [source(3.0, 2.0), source(2.0, 1.5), noise.step_noise(6, SHAPE)(2.0, 1.0)]
    assert torch.equal(first, source(2.0, 1.0))
    assert torch.equal(first, source(2.0 * (1 + 1e-15), 1.0)), "the last bit changed the key"
    for other in others:
        assert abs(float((first * other).mean())) < 0.1
    assert first.dtype == torch.float32
    before = torch.get_rng_state()
    source(1.0, 0.5)
    noise.initial_noise(3, SHAPE)
    assert torch.equal(before, torch.get_rng_state()), "the global generator was touched"


@given(st.lists(LEVELS, min_size=3, max_size=6))
@settings(max_examples=40, deadline=None)
def test_brownian_increments_add_up_in_any_order(levels: list[float]) -> None:
    path, again = noise.BrownianPath(1, SHAPE), noise.BrownianPath(1, SHAPE)
    steps = [path.increment(a, b) for a, b in pairwise(levels)]
    whole = again.increment(levels[0], levels[-1])
    assert torch.allclose(sum(steps[1:], steps[0]), whole, atol=1e-12)
    assert torch.equal(path.increment(levels[0], levels[1]), again.increment(levels[0], levels[1]))


def test_brownian_increments_are_unit_normal_and_independent() -> None:
    path = noise.brownian_noise(3, (64, 64))
    levels = [math.inf, 14.6, 14.5, 7.0, 3.0, 1.0, 0.3, 0.29, 0.03, 0.0]
    steps = [path(a, b) for a, b in pairwise(levels)]
    for k, z in enumerate(steps):
        assert abs(float(z.mean())) < 0.08
        assert abs(float(z.std()) - 1) < 0.05
        for other in steps[:k]:
            assert abs(float((z * other).mean())) < 0.08
    assert torch.allclose(path(3.0, 1.0), -path(1.0, 3.0))
    assert path(1.0, 1.0 + 1e-12).std() > 0.9


def test_batches_and_sequences() -> None:
    sources = [noise.step_noise(s, SHAPE) for s in (1, 2)]
    both = noise.batched(sources)(2.0, 1.0)
    assert both.shape == (2, *SHAPE)
    assert torch.equal(both[1], sources[1](2.0, 1.0))
    one = noise.sequential(torch.Generator().manual_seed(0), SHAPE)
    two = torch.Generator().manual_seed(0)
    for _ in range(2):
        assert torch.equal(one(9.0, 8.0), torch.randn(SHAPE, generator=two))
