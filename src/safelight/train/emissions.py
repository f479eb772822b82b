"""Energy and emissions, by the formula of the cards: power x time x carbon of the grid.

Lacoste et al. 2019, "Quantifying the Carbon Emissions of Machine Learning" (1910.09700), whose
calculator the v1 and v2 cards used: 150,000 hours of an A100 PCIe 40GB in AWS US-east are 11,250
kg, 200,000 are 15,000 kg. Estimates from rated power, not measurements.
"""

from __future__ import annotations

WATTS = {
    "A100 PCIe 40GB": 250.0,
    "A100 SXM4 80GB": 400.0,
    "A6000": 300.0,
    "H100 SXM": 700.0,
    "H200": 700.0,
    "V100 PCIe": 250.0,
}
"""Rated power of one device."""
GRID = {("AWS", "US-east"): 0.3}
"""kg of CO2 equivalents a kWh; (provider, region). The one that the cards' own figures imply."""
WORLD = 0.4
"""About the world's mean, for every other place: an assumption."""
WATTS_PER_CORE = 12.0
"""A busy server core with its share of the package, an assumption."""
WATTS_PER_GIB = 0.4
"""Memory, an assumption (Green Algorithms uses 0.3725)."""


def carbon(provider: str, region: str) -> float:
    """kg of CO2 equivalents a kWh of a place; the world's mean where it is not known."""
    return GRID.get((provider, region), WORLD)


def processor_watts(cores: float, gib: float) -> float:
    """Power of a machine without an accelerator."""
    return cores * WATTS_PER_CORE + gib * WATTS_PER_GIB


def estimate(hours: float, watts: float, kg_per_kwh: float = WORLD) -> tuple[float, float]:
    """Energy in kWh and emissions in kg of CO2 equivalents.

    Args:
        hours: of one device; a run on n devices has n times as many as the clock.
        watts: of one device.
    """
    kwh = hours * watts / 1000
    return kwh, kwh * kg_per_kwh
