"""The pieces that the networks share, where a whole network would not show them."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from safelight.nets.layers import sinusoid


@pytest.mark.parametrize("width", [320, 256, 64, 2048, 6])
@pytest.mark.parametrize("cos_first", [True, False])
def test_the_sinusoid_is_diffusers_bit_by_bit(width: int, cos_first: bool) -> None:
    times = torch.cat([torch.arange(1000.0), torch.tensor([0.5, 333.25, 980.9])])
    theirs = get_timestep_embedding(times, width, flip_sin_to_cos=cos_first, downscale_freq_shift=0)
    assert torch.equal(sinusoid(times, width, cos_first=cos_first), theirs)


def test_its_frequencies_fall_from_1_to_nearly_1e_4() -> None:
    at_one = sinusoid(torch.tensor([1.0]), 320)[0]
    assert at_one[0] == pytest.approx(math.cos(1.0))
    assert at_one[160] == pytest.approx(math.sin(1.0))
    assert at_one[-1] == pytest.approx(10000 ** -(159 / 160), rel=1e-4)  # sin x is x


def test_powers_of_two_do_not_depend_on_the_order_of_operations() -> None:
    # Models trained with either order are the same models: the tiny family's width is 64.
    times, half = torch.arange(1000.0), 32
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half).float())
    angles = times[:, None] * frequencies
    assert torch.equal(sinusoid(times, 64), torch.cat([angles.cos(), angles.sin()], dim=1))
