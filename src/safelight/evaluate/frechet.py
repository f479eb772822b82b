"""Fréchet distance between two sets of pictures, in the features of a network.

Dowson and Landau 1982, "The Fréchet distance between multivariate normal distributions",
equation 4, as Heusel et al. 2017 (1706.08500) use it for pictures (there with Inception's
features, here with any callable's)::

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)

All in float64, from streams: no set is ever held in memory. The distance of two finite samples
of one distribution is above zero and falls with their size, so compare sets of equal size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np


class FeatureStatistics:
    """Count, mean and scatter of feature vectors, gathered part by part.

    Parts are joined by the pairwise update of Chan, Golub and LeVeque 1983, which does not
    subtract large numbers.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = np.zeros(width)
        self._scatter = np.zeros((width, width))

    def add(self, features: np.ndarray) -> FeatureStatistics:
        """Take in features ``(N, width)``; returns itself.

        Raises:
            ValueError: another width, or a value that is not finite.
        """
        x = np.asarray(features, np.float64)
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"features are {x.shape}, expected (N, {len(self.mean)})")
        if not np.isfinite(x).all():
            raise ValueError("features hold NaN or infinity")
        if len(x):
            mean = x.mean(0)
            self._join(len(x), mean, (x - mean).T @ (x - mean))
        return self

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Take in another set's statistics; returns itself."""
        if other.count:
            self._join(other.count, other.mean, other._scatter)
        return self

    def without(self, part: FeatureStatistics) -> FeatureStatistics:
        """These statistics less those of a part of the set; a new object."""
        rest = FeatureStatistics(len(self.mean))
        rest.count = self.count - part.count
        if rest.count < 1:
            raise ValueError("nothing is left")
        apart = part.mean - self.mean
        rest.mean = self.mean - apart * (part.count / rest.count)
        rest._scatter = self._scatter - part._scatter
        rest._scatter -= np.outer(apart, apart) * (part.count * self.count / rest.count)
        return rest

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        apart = mean - self.mean
        self._scatter = self._scatter + scatter
        self._scatter += np.outer(apart, apart) * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance ``(width, width)``."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two vectors or more, there are {self.count}")
        return self._scatter / (self.count - 1)


def statistics(
    pictures: Iterable[np.ndarray], features: Callable[[np.ndarray], np.ndarray]
) -> FeatureStatistics:
    """Statistics of a stream of parts, uint8 ``(N, H, W, 3)`` each."""
    gathered: FeatureStatistics | None = None
    for part in pictures:
        x = features(part)
        gathered = (gathered or FeatureStatistics(x.shape[1])).add(x)
    if gathered is None:
        raise ValueError("no pictures")
    return gathered


def frechet_distance(one: FeatureStatistics, two: FeatureStatistics) -> float:
    """The squared Fréchet distance ``d^2`` (what is usually called "the" FID)."""
    return distance_to(rooted(one), two)


Rooted = tuple[FeatureStatistics, np.ndarray, np.ndarray]


def rooted(one: FeatureStatistics) -> Rooted:
    """Statistics with their covariance and its root, to be compared with many."""
    covariance = one.covariance
    return one, covariance, _root(covariance)


def distance_to(fixed: Rooted, two: FeatureStatistics) -> float:
    """:func:`frechet_distance`, where the root of one side is known."""
    one, c1, root = fixed
    apart, c2 = one.mean - two.mean, two.covariance
    # The trace of the product's root is the sum of its eigenvalues' roots; it is symmetric here,
    # so no general matrix root (and none of its imaginary parts) is needed.
    cross = np.sqrt(np.linalg.eigvalsh(root @ c2 @ root).clip(0)).sum()
    return float(max(0.0, apart @ apart + np.trace(c1) + np.trace(c2) - 2 * cross))


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T
