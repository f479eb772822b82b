"""Metrics against closed forms, scipy and loops that anybody can check."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.spatial.distance as apart
import scipy.stats

from safelight.evaluate import metrics
from safelight.evaluate.frechet import FeatureStatistics, frechet_distance


def normal(seed: int, n: int, d: int = 6, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)) * scale + shift


# -- the numbers --------------------------------------------------------------------------------


def test_frechet_is_the_one_that_is_known() -> None:
    x, y = normal(0, 200), normal(1, 300, shift=0.5)
    one, two = (FeatureStatistics(6).add(v) for v in (x, y))
    found = metrics.frechet(x, y, "f")
    assert found.value == pytest.approx(frechet_distance(one, two), rel=1e-9)
    assert (found.pictures, found.reference, found.features) == (200, 300, "f")


def test_a_part_is_taken_out_of_statistics_exactly() -> None:
    x = normal(2, 100) + 1e3
    rest = FeatureStatistics(6).add(x).without(FeatureStatistics(6).add(x[20:35]))
    left = np.delete(x, slice(20, 35), axis=0)
    np.testing.assert_allclose(rest.mean, left.mean(0), rtol=1e-12)
    np.testing.assert_allclose(rest.covariance, np.cov(left.T), rtol=1e-7, atol=1e-9)


def brute_mmd(x: np.ndarray, y: np.ndarray) -> float:
    d = x.shape[1]

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(a[i] * b[i] for i in range(d)) / d + 1) ** 3

    m, n = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


def test_kid_is_the_mean_over_blocks_of_the_loop() -> None:
    x, y = normal(3, 23, 4), normal(4, 31, 4, 0.3)
    rng = np.random.default_rng(7)
    p, q = rng.permutation(23), rng.permutation(31)
    blocks = [brute_mmd(x[p[i : i + 5]], y[q[i : i + 5]]) for i in (0, 5, 10, 15)]
    found = metrics.kid(x, y, "f", block=5, seed=7)
    assert found.value == pytest.approx(np.mean(blocks))
    assert "4 disjoint blocks of 5" in found.how
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(blocks), scipy.stats.sem(blocks))
    assert found.interval == pytest.approx((low, high), abs=1e-2 * (high - low))
    whole = metrics.kid(x, y[:23], "f")
    assert whole.value == pytest.approx(brute_mmd(x, y[:23]))
    assert whole.interval is None


def test_kid_meets_its_expectation_on_gaussians() -> None:
    """With d = 1, x ~ N(0, 1), y ~ N(m, 1): E (xy + 1)^3 from moments."""
    m = 0.7
    xx = 1 + 3 * 1  # 1 + 3 E[x x'] + 3 E[x²]² + E[x³]², E[x] = E[x³] = 0
    y1, y2, y3 = m, 1 + m * m, m**3 + 3 * m
    yy = 1 + 3 * y1**2 + 3 * y2**2 + y3**2
    xy = 1 + 3 * y2
    found = metrics.kid(normal(5, 20000, 1), normal(6, 20000, 1, m), "f")
    assert found.interval is not None
    assert found.interval[0] < xx + yy - 2 * xy < found.interval[1]


def test_kid_of_one_distribution_is_around_zero_not_above_it() -> None:
    found = [metrics.kid(normal(s, 200), normal(s + 50, 200), "f").value for s in range(20)]
    assert min(found) < 0 < max(found)
    assert abs(np.mean(found)) < 3 * scipy.stats.sem(found)


def test_cmmd_is_the_authors_formula() -> None:
    x, y = normal(8, 33, 8), normal(9, 45, 8, 0.4)
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))

    def mean(p: np.ndarray, q: np.ndarray) -> float:
        return float(np.exp(-apart.cdist(p, q, "sqeuclidean") / (2 * 10.0**2)).mean())

    expected = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert metrics.cmmd(x, y, "f").value == pytest.approx(expected, rel=1e-6)
    assert metrics.cmmd(3 * x, y, "f").value == pytest.approx(expected, rel=1e-6)
    assert metrics.cmmd(x, x, "f").value == pytest.approx(0, abs=1e-9)


def test_clip_score_is_the_mean_cosine_without_negative_ones() -> None:
    pictures = np.array([[1.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    words = np.array([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    found = metrics.clip_score(pictures, words, "f")
    assert found.value == pytest.approx(100 * (1 + 0.6 + 0) / 3)
    assert metrics.clip_score(pictures, words, "f", weight=2.5).value == pytest.approx(
        2.5 * 1.6 / 3
    )
    assert "2.5 max(cos, 0)" in metrics.clip_score(pictures, words, "f", weight=2.5).convention
    assert metrics.fidelity(pictures, words, "f").value == pytest.approx((1 + 0.6 - 1) / 3)


def test_precision_and_recall_are_the_papers_loop() -> None:
    x, y = normal(10, 40, 2), normal(11, 60, 2, 1.0)

    def share(points: np.ndarray, of: np.ndarray) -> float:
        distances = apart.cdist(of, of)
        reach = [sorted(row)[3] for row in distances]  # the first is itself
        hits = [any(np.linalg.norm(p - q) <= r for q, r in zip(of, reach, strict=True))
                for p in points]  # fmt: skip
        return float(np.mean(hits))

    precision, recall = metrics.precision_recall(x, y, "f")
    assert precision.value == pytest.approx(share(x, y))
    assert recall.value == pytest.approx(share(y, x))
    assert 0 < recall.value < 1


def test_a_set_that_forgets_half_keeps_precision_and_loses_recall() -> None:
    both = np.concatenate([normal(12, 200, 3), normal(13, 200, 3, 30.0)])
    precision, recall = metrics.precision_recall(normal(14, 200, 3), both, "f")
    assert precision.value > 0.9
    assert recall.value < 0.52


# -- the intervals ------------------------------------------------------------------------------


@pytest.mark.parametrize("dof", [1, 2, 3, 5, 9, 19, 200])
def test_students_quantile(dof: int) -> None:
    assert metrics.quantile(dof) == pytest.approx(scipy.stats.t.ppf(0.975, dof), rel=2e-3)


@pytest.mark.parametrize("metric", ["frechet", "cmmd"])
def test_the_jackknife_knows_how_far_values_spread(metric: str) -> None:
    """Its half width against the spread of the value over fresh samples."""
    values, halves = [], []
    for s in range(60):
        found = metrics.METRICS[metric](normal(2 * s, 300, 3), normal(2 * s + 1, 300, 3, 0.5), "f")
        assert isinstance(found, metrics.Measured)
        assert found.interval is not None
        values.append(found.value)
        halves.append((found.interval[1] - found.interval[0]) / 2)
    true = metrics.quantile(19) * np.std(values, ddof=1)
    assert 0.75 < np.mean(halves) / true < 1.35


@pytest.mark.parametrize("metric", ["frechet", "cmmd"])
def test_a_sorted_set_has_the_interval_of_its_pictures(metric: str) -> None:
    x, y = normal(20, 400, 3), normal(21, 400, 3, 0.5)
    widths = []
    for a, b in ((x, y), (x[x[:, 0].argsort()], y[y[:, 0].argsort()])):
        found = metrics.METRICS[metric](a, b, "f")
        assert isinstance(found, metrics.Measured)
        assert found.interval is not None
        widths.append(found.interval[1] - found.interval[0])
    assert 0.5 < widths[1] / widths[0] < 2


def test_clip_scores_interval_holds_the_truth_as_often_as_it_says() -> None:
    inside = 0
    words = np.tile([1.0, 0.0], (30, 1))
    for s in range(200):
        angle = np.random.default_rng(s).uniform(0, np.pi / 2, 30)
        found = metrics.clip_score(np.stack([np.cos(angle), np.sin(angle)], 1), words, "f")
        assert found.interval is not None
        inside += found.interval[0] <= 100 * 2 / np.pi <= found.interval[1]
    assert 0.90 <= inside / 200 <= 0.99


def test_few_pictures_have_no_interval_and_one_has_no_distance() -> None:
    x = normal(15, 3)
    assert metrics.frechet(x, x + 1, "f").interval is None
    with pytest.raises(ValueError, match="two pictures"):
        metrics.frechet(x[:1], x, "f")
    with pytest.raises(ValueError, match="one extractor"):
        metrics.cmmd(x, x[:, :3], "f")
    with pytest.raises(ValueError, match="NaN"):
        metrics.kid(x * np.nan, x, "f")
    with pytest.raises(ValueError, match="neighbours"):
        metrics.precision_recall(x, x, "f")


# -- faults that must be found ------------------------------------------------------------------


def test_the_diagonal_is_left_out_of_kid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the biased estimate. Same distribution: it stands above zero, far outside."""

    def biased(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> float:
        return float(xx.mean() + yy.mean() - 2 * xy.mean())

    monkeypatch.setattr(metrics, "unbiased_mmd", biased)
    found = [metrics.kid(normal(s, 200), normal(s + 50, 200), "f").value for s in range(20)]
    assert min(found) > 0


def test_a_neighbour_is_not_oneself(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(16, 30, 2)
    honest = metrics.reach(x, 3)
    monkeypatch.setattr(np, "inf", 0.0)
    assert not np.allclose(metrics.reach(x, 3), honest)
