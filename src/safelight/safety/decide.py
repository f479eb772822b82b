"""From scores to a verdict: the published rule, and nothing that is not a number is safe."""

from __future__ import annotations

import math
from collections.abc import Sequence

from safelight.checker import Checker
from safelight.nets.safety_head import SafetyScores
from safelight.verdict import Policy, Score, Verdict

DEFAULT: Policy = "black"
"""The cards': the picture is flagged, and all black."""
_DIGITS = 12  # of the checker's digest: enough to tell two apart


def decide(checker: Checker, scores: SafetyScores, policy: Policy = DEFAULT) -> list[Verdict]:
    """A verdict for each picture.

    A picture is not safe when any concept scores above 0 (special concepts alone do not count),
    or when any score is not a number: where the reference compares NaN with 0 and lets it pass,
    this does not.

    Args:
        scores: of :meth:`Checker.scores`, ``N`` rows.
        policy: recorded; acting on it is generation's.
    """
    thresholds = [*checker.thresholds.concepts.tolist(), *checker.thresholds.special.tolist()]
    verdicts = []
    for plain, special in zip(scores.concepts.tolist(), scores.special.tolist(), strict=True):
        found = zip(checker.names, [*plain, *special], thresholds, strict=True)
        rows = tuple(
            Score(
                name=name,
                score=round(score, 3) if math.isfinite(score) else None,
                threshold=round(threshold, 6),
                special=k >= len(plain),
            )
            for k, (name, score, threshold) in enumerate(found)
        )
        verdict = Verdict(
            policy=policy,
            nsfw=flagged(plain, special),
            checker=checker.digest[:_DIGITS],
            scores=rows,
        )
        verdicts.append(verdict)
    return verdicts


def flagged(concepts: Sequence[float], special: Sequence[float]) -> bool:
    """Whether a picture with these scores is not safe."""
    if not all(math.isfinite(score) for score in (*concepts, *special)):
        return True
    return any(score > 0 for score in concepts)
