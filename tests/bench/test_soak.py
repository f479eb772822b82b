"""The soak's own arithmetic: what it would say of servers that keep their word, and of others."""

from __future__ import annotations

from collections import Counter

import pytest
from benchmarks.soak import DEADLINE, Findings, Load, job, judge


def load(
    *, rate: float = 2.0, took: float = 10.0, leak: float = 0.0, more: dict[int, int] | None = None
) -> Load:
    """A hundred seconds of overload of a server that makes ``rate`` pictures a second."""
    count = int(100 * rate)
    statuses = Counter({200: count, 429: count, **(more or {})})
    answered = [(k / rate, took) for k in range(count)]
    memory = [(k, 500 + leak * k / 100) for k in range(count)]
    return Load(0.0, answered, statuses, [0.01] * count, memory)


@pytest.mark.parametrize(
    ("found", "missed"),
    [
        (load(), []),
        (load(rate=1.8), ["goodput at twice the peak"]),
        (load(took=DEADLINE + 1), ["goodput at twice the peak", "p99 of accepted requests"]),
        (load(leak=1.5), ["memory slope, second half"]),
        (load(more={500: 1}), ["answers"]),
        (load(more={429: 0}), ["answers"]),
    ],
)
def test_the_verdict(found: Load, missed: list[str]) -> None:
    findings = Findings()
    judge(findings, found, 2.0, 100.0)
    assert [what for what, _, _, met in findings.rows if not met] == missed
    assert findings.markdown().count("✗") == len(missed)


def test_the_storms_jobs_are_twelve_in_two_kinds() -> None:
    jobs = [job(k) for k in range(24)]
    assert {each["seed"] for each in jobs[:12]} == {each["seed"] for each in jobs[12:]}
    assert [each["deterministic"] for each in jobs] == [True] * 12 + [False] * 12
    assert job(0) == job(24)
