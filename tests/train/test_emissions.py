"""The cards' own figures, from the formula."""

from __future__ import annotations

import pytest

from safelight.train.card import energy
from safelight.train.emissions import WATTS, carbon, estimate


@pytest.mark.parametrize(("hours", "kg"), [(150_000, 11_250), (200_000, 15_000)])
def test_the_cards_figures(hours: float, kg: float) -> None:
    made = estimate(hours, WATTS["A100 PCIe 40GB"], carbon("AWS", "US-east"))
    assert made[1] == pytest.approx(kg)


def test_an_unknown_place_has_the_worlds_mean() -> None:
    assert carbon("AWS", "the moon") == 0.4
    assert energy(3600, 2, 24) == pytest.approx((0.0336, 0.01344))
