"""Paired comparisons: the interval covers as often as it says, and lists are matched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from safelight.cli import evaluate
from safelight.errors import InvalidRequest
from safelight.evaluate.paired import compare, paired


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    shares = np.array([0.80, 0.05, 0.08, 0.07])  # both, first only, second only, neither
    hits = 0
    for _ in range(2000):
        cell = rng.choice(4, size=300, p=shares)
        found = paired(cell <= 1, (cell == 0) | (cell == 2))
        hits += found.low <= 0.03 <= found.high
    assert 0.93 <= hits / 2000 <= 0.97


def test_pairs_see_more_than_two_separate_samples() -> None:
    rng = np.random.default_rng(1)
    first = rng.random(4000) < 0.9
    second = first.copy()
    second[:60] = True  # six of the hard ones
    found = paired(first, second)
    gained = int((second & ~first).sum())
    assert found.difference == pytest.approx(gained / 4000)
    assert found.low > 0
    unpaired = 1.96 * np.sqrt(2 * 0.9 * 0.1 / 4000)
    assert found.high - found.low < unpaired


def test_turned_around_the_difference_changes_its_sign() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random((2, 500)) < [[0.9], [0.8]]
    there, back = paired(a, b), paired(b, a)
    assert there.difference == pytest.approx(-back.difference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_equal_models_are_not_told_apart() -> None:
    flags = np.array([True, False, True, True])
    found = paired(flags, flags)
    assert found.difference == 0
    assert found.low < 0 < found.high


def test_cases_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="not pairs"):
        paired(np.ones(3, bool), np.ones(4, bool))


def _scores(folder: Path, **lists: str) -> Path:
    folder.mkdir()
    found = {name: {"each": each} for name, each in lists.items()}
    (folder / "scores.json").write_text(json.dumps({"lists": found}))
    return folder


def test_folders_are_compared_list_by_list(tmp_path: Path) -> None:
    one = _scores(tmp_path / "a", seen="1100", held_out="111")
    other = _scores(tmp_path / "b", seen="1110", held_out="11")
    assert set(compare(one, other)) == {"seen"}
    assert compare(one, other)["seen"].difference == 0.25
    said = CliRunner().invoke(evaluate.app, ["compare", str(one), str(other)])
    assert "| seen | 4 | 50.0 % | 75.0 % | +25.0 points" in said.output


def test_folders_without_scores_or_lists_in_common_are_refused(tmp_path: Path) -> None:
    one = _scores(tmp_path / "a", seen="11")
    with pytest.raises(InvalidRequest, match="holds no scores"):
        compare(one, tmp_path / "nothing")
    with pytest.raises(InvalidRequest, match="share no list"):
        compare(one, _scores(tmp_path / "b", seen="111"))
