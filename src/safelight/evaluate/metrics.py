"""How far two sets of pictures are apart, and how well pictures follow their words.

From features alone (:mod:`safelight.evaluate.features`), each result with a 95 % interval and how
it was found. Sources, and the conventions where several are in use:

- Fréchet distance: :mod:`safelight.evaluate.frechet`.
- KID: Bińkowski et al. 2018, 1801.01401, section 4: unbiased MMD^2, Gretton et al. 2012 equation 3,
  of the kernel (x·y/D + 1)^3, averaged over blocks. Ours are disjoint, so that they are independent
  and their spread gives an interval. Not multiplied by anything.
- CMMD: Jayasumana et al. 2024, 2401.09603: MMD^2 of exp(-|x - y|^2 / (2·10^2)) on CLIP embeddings
  of unit length, times 1000; as in the authors' code, with the terms of pictures with themselves
  (Gretton's equation 5).
- CLIP score: Hessel et al. 2021, 2104.08718, w·max(cos, 0). ``clip_score`` has w = 100, as it is
  mostly reported; the paper's own w is 2.5. The cards' figure shows the plain cosine.
- Precision and recall: Kynkäänniemi et al. 2019, 1904.06991, equations 1 and 2 with k = 3.

The intervals cover chance in the pictures, not the bias of finite sets: compare sets of one size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from safelight.data.clip import unit
from safelight.evaluate.frechet import FeatureStatistics, Rooted, distance_to, rooted
from safelight.evaluate.score import Share
from safelight.spec import Record

GROUPS = 20
"""Parts of a set that the jackknife leaves out in turn."""
KID_BLOCK = 1000
"""The paper's block; smaller where the sets are, so that there are ten."""
_KID_LEAST = 50
"""Below this a block's estimate is mostly chance."""
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
CLIP_SCORE_WEIGHT = 100.0
_Z = 1.959963984540054
_ROWS = 1024


class Measured(Record):
    """One number, and what it is a number of."""

    metric: str
    value: float
    interval: tuple[float, float] | None
    """95 %; None where there are too few pictures."""
    how: str
    """How the interval was found."""
    features: str
    """The extractor's name."""
    pictures: int
    reference: int = 0
    """Pictures of the other set."""
    convention: str = ""

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} ({self.interval[0]:.4g} to {self.interval[1]:.4g})"


def frechet(made: np.ndarray, reference: np.ndarray, features: str) -> Measured:
    """Squared Fréchet distance of features ``(N, D)`` and ``(M, D)``.

    The interval is a jackknife's over groups (Efron and Stein 1981), of both sets: a bootstrap
    would be above the distance itself, for a resampled set has fewer pictures.
    """
    a, b = (_shuffled(x) for x in _checked(made, reference))
    one, two = _statistics(a), _statistics(b)
    root_one, root_two = rooted(one), rooted(two)

    def left_out(x: np.ndarray, of: FeatureStatistics, fixed: Rooted) -> list[float]:
        if len(x) < 4:  # what is left needs a covariance
            return []
        return [distance_to(fixed, of.without(_statistics(part))) for part in _groups(x)]

    value = distance_to(root_two, one)
    replicas = left_out(a, one, root_two), left_out(b, two, root_one)
    return Measured(
        metric="frechet", value=value, interval=_jackknifed(value, *replicas, low=0.0),
        how=f"jackknife over {GROUPS} groups of each set", features=features,
        pictures=len(a), reference=len(b), convention="squared distance",
    )  # fmt: skip


def kid(
    made: np.ndarray, reference: np.ndarray, features: str, *, block: int = KID_BLOCK, seed: int = 0
) -> Measured:
    """Kernel inception distance: the mean over disjoint blocks, with Student's interval.

    Args:
        made, reference: features ``(N, D)`` and ``(M, D)``.
        features: the extractor's name.
        block: most pictures of each set in a block. Of small sets the blocks are smaller, so that
            there are ten, but not below 50; a single block has no interval.
        seed: of the shuffle that makes the blocks.
    """
    a, b = _checked(made, reference)
    least = min(len(a), len(b))
    size = min(least, block, max(_KID_LEAST, least // 10))
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(a)), rng.permutation(len(b))
    found = []
    for start in range(0, least - size + 1, size):
        x, y = a[rows[0][start : start + size]], b[rows[1][start : start + size]]
        found.append(unbiased_mmd(_cubic(x, x), _cubic(y, y), _cubic(x, y)))
    return Measured(
        metric="kid", value=float(np.mean(found)), interval=student(np.array(found)),
        how=f"Student, over {len(found)} disjoint blocks of {size}", features=features,
        pictures=len(a), reference=len(b), convention="MMD^2, not scaled",
    )  # fmt: skip


def unbiased_mmd(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> float:
    """MMD^2 from kernel matrices, Gretton et al. 2012, equation 3."""
    m, n = len(xx), len(yy)
    within = (xx.sum() - np.trace(xx)) / (m * (m - 1)) + (yy.sum() - np.trace(yy)) / (n * (n - 1))
    return float(within - 2 * xy.mean())


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def cmmd(made: np.ndarray, reference: np.ndarray, features: str) -> Measured:
    """CLIP maximum mean discrepancy of embeddings ``(N, D)`` and ``(M, D)``, of any length."""
    a, b = (_shuffled(unit(x)) for x in _checked(made, reference))
    xx, yy, xy = (_kernel_sums(*pair) for pair in ((a, a), (b, b), (a, b)))
    m = np.array([len(g) for g in _groups(a)])
    n = np.array([len(g) for g in _groups(b)])

    def distance(left: np.ndarray, right: np.ndarray) -> float:
        """Of the groups that ``left`` and ``right`` keep (1) and leave out (0)."""
        p, q = left @ m, right @ n
        terms = left @ xx @ left / p**2 + right @ yy @ right / q**2
        return float(CMMD_SCALE * (terms - 2 * (left @ xy @ right) / (p * q)))

    all_a, all_b = np.ones(len(m)), np.ones(len(n))
    value = distance(all_a, all_b)
    first = [distance(row, all_b) for row in 1 - np.eye(len(m))] if len(m) > 1 else []
    second = [distance(all_a, row) for row in 1 - np.eye(len(n))] if len(n) > 1 else []
    return Measured(
        metric="cmmd", value=value, interval=_jackknifed(value, first, second, low=0.0),
        how=f"jackknife over {GROUPS} groups of each set", features=features,
        pictures=len(a), reference=len(b), convention="unit length, sigma 10, times 1000",
    )  # fmt: skip


def _kernel_sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sums of the Gaussian kernel between every two groups."""
    parts = _groups(y)
    ends = np.cumsum([0] + [len(p) for p in parts])[:-1]
    rows = []
    for part in _groups(x):
        # Unit vectors: |x - y|^2 = 2 - 2 x·y.
        kernel = np.exp((part @ y.T - 1) / CMMD_SIGMA**2)
        rows.append(np.add.reduceat(kernel.sum(0), ends))
    return np.stack(rows)


def clip_score(
    pictures: np.ndarray, words: np.ndarray, features: str, *, weight: float = CLIP_SCORE_WEIGHT
) -> Measured:
    """Mean of ``weight * max(cos, 0)`` of picture and text embeddings, ``(N, D)`` each."""
    scores = weight * np.maximum(cosines(pictures, words), 0)
    return Measured(
        metric="clip_score", value=float(scores.mean()), interval=student(scores),
        how="Student, over pictures", features=features, pictures=len(scores),
        convention=f"{weight:g} max(cos, 0)",
    )  # fmt: skip


def fidelity(inputs: np.ndarray, outputs: np.ndarray, features: str) -> Measured:
    """How like their inputs variations are: mean cosine of embeddings, ``(N, D)`` each."""
    scores = cosines(inputs, outputs)
    return Measured(
        metric="fidelity", value=float(scores.mean()), interval=student(scores),
        how="Student, over pictures", features=features, pictures=len(scores),
        convention="cosine",
    )  # fmt: skip


def cosines(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Cosine of each row with the other's, float64 ``(N,)``."""
    if one.shape != two.shape:
        raise ValueError(f"{one.shape} and {two.shape} are not pairs")
    return (unit(one.astype(np.float64)) * unit(two.astype(np.float64))).sum(1)


def psnr(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture in dB, ``(N,)``; infinite where they are equal.

    Args:
        one, other: uint8 ``(N, H, W, 3)``.
    """
    error = (one.astype(np.float64) - other).reshape(len(one), -1)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / np.square(error).mean(1))


def precision_recall(
    made: np.ndarray, reference: np.ndarray, features: str, *, k: int = 3
) -> tuple[Measured, Measured]:
    """Improved precision and recall of features ``(N, D)`` and ``(M, D)``.

    Precision: the share of made pictures within reach of a reference one, whose reach is the
    distance to its k-th neighbour; recall: the other way round. The intervals are Wilson's, with
    the reaches held fixed.
    """
    a, b = _checked(made, reference)
    if min(len(a), len(b)) <= k:
        raise ValueError(f"{k} neighbours need more than {k} pictures in each set")
    reached = _within(a, b, reach(b, k)), _within(b, a, reach(a, k))
    results = []
    for metric, flags in zip(("precision", "recall"), reached, strict=True):
        share = Share.of(flags)
        results.append(
            Measured(
                metric=metric, value=share.value, interval=share.interval,
                how="Wilson, manifolds held fixed", features=features,
                pictures=len(a), reference=len(b), convention=f"k = {k}",
            )
        )  # fmt: skip
    return results[0], results[1]


def reach(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance ``(N,)`` of each vector to its k-th nearest other one."""
    found = []
    for start in range(0, len(x), _ROWS):
        apart = squared_distances(x[start : start + _ROWS], x)
        rows = np.arange(len(apart))
        apart[rows, start + rows] = np.inf  # not itself
        found.append(np.partition(apart, k - 1, axis=1)[:, k - 1])
    return np.concatenate(found)


def _within(x: np.ndarray, y: np.ndarray, reaches: np.ndarray) -> np.ndarray:
    parts = [
        (squared_distances(x[i : i + _ROWS], y) <= reaches).any(1) for i in range(0, len(x), _ROWS)
    ]
    return np.concatenate(parts)


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``(N, M)``, in the arrays' precision."""
    return np.maximum((x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * (x @ y.T), 0)


METRICS: dict[str, Callable[..., Measured | tuple[Measured, ...]]] = {
    "frechet": frechet,
    "kid": kid,
    "cmmd": cmmd,
    "precision-recall": precision_recall,
}
"""Those between two sets, by name: features, features, the extractor's name."""


def table(rows: Sequence[Measured]) -> str:
    """Results in Markdown."""
    lines = [
        "| metric | value (95 %) | convention | interval | features |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {m.metric} | {m} | {m.convention} | {m.how} | {m.features} |" for m in rows]
    return "\n".join(lines) + "\n"


def quantile(dof: int) -> float:
    """The 97.5 % point of Student's distribution, by Abramowitz and Stegun 1964, 26.7.5."""
    z, n = _Z, float(dof)
    if dof < 3:
        return {1: 12.7062, 2: 4.30265}[dof]
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / n + second / n**2 + third / n**3 + fourth / n**4


def student(values: np.ndarray) -> tuple[float, float] | None:
    """The interval of a mean of independent values."""
    n = len(values)
    if n < 2:
        return None
    half = quantile(n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    return float(values.mean()) - half, float(values.mean()) + half


def _jackknifed(
    value: float, *replicas: Sequence[float], low: float = -math.inf
) -> tuple[float, float] | None:
    """The interval from values with one group left out, a row of them for each set."""
    if any(len(row) < 2 for row in replicas):
        return None
    variance = sum((len(r) - 1) * float(np.var(r)) for r in replicas)
    half = quantile(min(len(r) for r in replicas) - 1) * math.sqrt(variance)
    return max(low, value - half), value + half


def _shuffled(x: np.ndarray) -> np.ndarray:
    """Rows in another order, always the same: sets are often sorted, groups must not be."""
    return x[np.random.default_rng(0).permutation(len(x))]


def _groups(x: np.ndarray) -> list[np.ndarray]:
    """Consecutive parts of about equal size."""
    return np.array_split(x, min(GROUPS, len(x)))


def _statistics(x: np.ndarray) -> FeatureStatistics:
    return FeatureStatistics(x.shape[1]).add(x)


def _checked(made: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(made, np.float64), np.asarray(reference, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features are {a.shape} and {b.shape}: they must be of one extractor")
    if min(len(a), len(b)) < 2:
        raise ValueError("a distance needs two pictures or more in each set")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features hold NaN or infinity")
    return a, b
