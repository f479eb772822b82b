"""Two models on the same prompts and seeds: the difference of what they get right, in pairs.

Pairs make a point of difference visible: what is hard for both cancels out. The interval is that
of Agresti and Min 2005 ("Simple improved confidence intervals for comparing matched proportions",
Statistics in Medicine 24): Wald's, after half a pair was added to each cell of the 2x2 table.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from safelight.errors import InvalidRequest

_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Paired:
    """Shares of the same ``total`` cases that two models get right."""

    first: float
    second: float
    total: int
    low: float
    high: float
    """Ends of the 95 % interval of ``second - first``."""

    @property
    def difference(self) -> float:
        """``second - first``: positive where the second is better."""
        return self.second - self.first

    def __str__(self) -> str:
        low, high = 100 * self.low, 100 * self.high
        return f"{100 * self.difference:+.1f} points ({low:+.1f} to {high:+.1f})"


def paired(first: np.ndarray, second: np.ndarray) -> Paired:
    """Compare two models, case by case.

    Args:
        first, second: bool ``(N,)``, whether each case is right.

    Raises:
        ValueError: they are not of the same cases.
    """
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"not pairs: {first.shape} and {second.shape}")
    n = len(first)
    gained = float(np.count_nonzero(second & ~first)) + 0.5
    lost = float(np.count_nonzero(first & ~second)) + 0.5
    middle = (gained - lost) / (n + 2)
    spread = (gained + lost) / (n + 2) - middle**2
    half = _Z95 * math.sqrt(spread / (n + 2))
    return Paired(float(first.mean()), float(second.mean()), n, middle - half, middle + half)


def compare(first: Path, second: Path) -> dict[str, Paired]:
    """Compare two folders that ``safelight evaluate`` wrote, list by list.

    Raises:
        InvalidRequest: one holds no scores, or they have no list of equal length in common.
    """
    one, other = _each(first), _each(second)
    same = [name for name in one if name in other and len(one[name]) == len(other[name])]
    if not same:
        raise InvalidRequest(
            "lists",
            f"{first} and {second} share no list of equal length.",
            "Run safelight evaluate with the same --list and --limit for both.",
        )
    return {name: paired(one[name], other[name]) for name in same}


def _each(folder: Path) -> dict[str, np.ndarray]:
    file = folder / "scores.json" if folder.is_dir() else folder
    try:
        lists = json.loads(file.read_text())["lists"]
        found = {name: it["each"] for name, it in lists.items()}
    except (OSError, ValueError, KeyError, TypeError):
        raise InvalidRequest(
            "scores", f"{file} holds no scores of single prompts.", "Run safelight evaluate again."
        ) from None
    return {name: np.array([digit == "1" for digit in row]) for name, row in found.items()}
