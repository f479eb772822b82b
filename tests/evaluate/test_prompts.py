"""The committed prompt lists are what still life gives, and tuning shares nothing with tests."""

from __future__ import annotations

import dataclasses

import pytest

from safelight.data import stilllife
from safelight.data.stilllife import Arrangement
from safelight.errors import WeightsError
from safelight.evaluate import prompts

TESTS = ("seen", "held_out", "single", "pair", "paired")


@pytest.mark.parametrize("name", prompts.DIGESTS)
def test_a_list_is_what_still_life_gives(name: str) -> None:
    made = prompts.build(name)
    assert prompts.load(name) == made
    assert prompts.digest(prompts.dump(made)) == prompts.DIGESTS[name]
    assert len(made) == prompts.COUNTS[name]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("seen", "train"),
        ("held_out", "combo"),
        ("single", "train"),
        ("pair", "pair"),
        ("tuning", "train"),
        ("paired", "combo"),
    ],
)
def test_every_prompt_asks_for_its_own_scene(name: str, split: str) -> None:
    for prompt in prompts.load(name, 200):
        scene = prompt.scene()
        wanted = stilllife.parse(prompt.text)
        assert wanted is not None
        assert wanted.fits(scene)
        assert stilllife.split_of(scene) == split
        if name in ("seen", "held_out", "paired"):
            assert scene.arrangement != Arrangement.SINGLE


def test_tuning_shares_no_seed_and_no_combination_with_the_tests() -> None:
    tuning = prompts.load("tuning")
    seeds = [p.seed for name in (*TESTS, "tuning") for p in prompts.load(name)]
    assert len(set(seeds)) == len(seeds)

    def combinations(name: str) -> set[object]:
        return {
            (s.arrangement, *(thing.pair for thing in s.things))
            for s in (p.scene() for p in prompts.load(name))
            if s.arrangement != Arrangement.SINGLE
        }

    for name in TESTS:
        assert not combinations("tuning") & combinations(name)
    assert sum(p.scene().arrangement == Arrangement.SINGLE for p in tuning) == 100


def test_a_changed_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = prompts.load("seen")
    changed[3] = dataclasses.replace(changed[3], seed=changed[3].seed + 1)
    monkeypatch.setitem(prompts.DIGESTS, "seen", prompts.digest(prompts.dump(changed)))
    with pytest.raises(WeightsError, match=r"seen\.jsonl"):
        prompts.load("seen")


def test_an_unknown_list_names_the_known_ones() -> None:
    with pytest.raises(KeyError, match="held_out"):
        prompts.load("seen_and_unseen")
