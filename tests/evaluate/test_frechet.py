"""The Fréchet distance against closed forms, and the stream against the whole."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from safelight.evaluate.frechet import FeatureStatistics, frechet_distance, statistics


def exactly(mean: np.ndarray, covariance: np.ndarray, seed: int = 0, n: int = 500) -> np.ndarray:
    """Vectors whose sample mean and covariance are exactly the given ones."""
    d = len(mean)
    z = np.random.default_rng(seed).standard_normal((n, d))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T)).T)
    return z @ np.linalg.cholesky(covariance).T + mean


def gathered(x: np.ndarray) -> FeatureStatistics:
    return FeatureStatistics(x.shape[1]).add(x)


def some_covariance(d: int, seed: int) -> np.ndarray:
    a = np.random.default_rng(seed).standard_normal((d, 2 * d))
    return a @ a.T / d


def test_diagonal_gaussians_have_their_closed_form() -> None:
    m1, m2 = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, 1.0])
    s1, s2 = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.25, 0.5])
    one, two = gathered(exactly(m1, np.diag(s1**2))), gathered(exactly(m2, np.diag(s2**2), 1))
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-9)


def test_any_gaussians_agree_with_the_general_matrix_root() -> None:
    c1, c2 = some_covariance(12, 0), some_covariance(12, 1)
    m = np.linspace(-1, 1, 12)
    one, two = gathered(exactly(m, c1)), gathered(exactly(-m, c2, 1))
    cross = scipy.linalg.sqrtm(c1 @ c2)
    expected = 4 * (m @ m) + np.trace(c1 + c2 - 2 * np.real(cross))
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(two, one) == pytest.approx(expected, rel=1e-8)


def test_a_translation_costs_its_square_and_itself_costs_nothing() -> None:
    x = np.random.default_rng(2).standard_normal((300, 8))
    step = np.arange(8) / 4
    assert frechet_distance(gathered(x), gathered(x + step)) == pytest.approx(step @ step)
    assert frechet_distance(gathered(x), gathered(x)) == pytest.approx(0, abs=1e-9)


def test_scaling_costs_the_difference_of_deviations() -> None:
    c = some_covariance(6, 3)
    x = exactly(np.zeros(6), c)
    # sqrt of C (9 C) is 3 C: d^2 = tr(C + 9 C - 6 C).
    assert frechet_distance(gathered(x), gathered(3 * x)) == pytest.approx(4 * np.trace(c))


def test_a_rank_deficient_set_is_no_trouble() -> None:
    x = np.random.default_rng(4).standard_normal((5, 16))
    assert np.isfinite(frechet_distance(gathered(x), gathered(x + 1)))


def test_the_stream_is_the_whole_even_far_from_zero() -> None:
    x = np.random.default_rng(5).standard_normal((1000, 5)) + 1e7
    parts = FeatureStatistics(5)
    for part in np.split(x, [1, 10, 500, 500, 999]):
        parts.add(part)
    joined = gathered(x[:300]).merge(gathered(x[300:])).merge(FeatureStatistics(5))
    for found in (parts, joined):
        assert found.count == 1000
        np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-14)
        np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-6, atol=1e-8)


def test_float16_features_are_gathered_in_float64() -> None:
    x = np.random.default_rng(6).standard_normal((4000, 3)).astype(np.float16)
    np.testing.assert_allclose(gathered(x).covariance, np.cov(x.astype(np.float64).T), rtol=1e-10)


@pytest.mark.parametrize("fault", ["mean", "cross", "biased"])
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    c1, c2 = some_covariance(6, 7), some_covariance(6, 8)
    one, two = gathered(exactly(np.ones(6), c1, n=20)), gathered(exactly(np.zeros(6), c2, 1, 20))
    expected = 6 + np.trace(c1 + c2 - 2 * np.real(scipy.linalg.sqrtm(c1 @ c2)))
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-6)
    if fault == "mean":
        one.mean = one.mean * 1.01
    elif fault == "cross":
        monkeypatch.setattr("safelight.evaluate.frechet._root", np.linalg.cholesky)
        monkeypatch.setattr("numpy.linalg.eigvalsh", lambda m: np.linalg.eigvals(m).real)
    else:
        one.count += 1
    assert frechet_distance(one, two) != pytest.approx(expected, rel=1e-6)


def test_features_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        FeatureStatistics(3).add(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="NaN"):
        FeatureStatistics(2).add(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match="two vectors"):
        _ = FeatureStatistics(2).add(np.zeros((1, 2))).covariance
    with pytest.raises(ValueError, match="no pictures"):
        statistics([], lambda x: x)
