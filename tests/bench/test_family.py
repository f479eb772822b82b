"""The family's measures measure: scenes are changed as said, truth scores high, others low."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks import family_page
from benchmarks.family import cost, members
from benchmarks.family_measures import overlap, recoloured, repainted

from safelight.data import stilllife
from safelight.evaluate import prompts
from safelight.nets.unet import UNet
from safelight.presets import TINY_UNET


def scenes(count: int) -> list[stilllife.Scene]:
    return [p.scene() for p in prompts.load("paired", count)]


def test_one_thing_is_exchanged_and_the_other_stays() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(40):
        changed, slot = repainted(scene, rng)
        (old, kept), (new, same) = (
            (s.a, s.b) if slot == 0 else (s.b, s.a) for s in (scene, changed)
        )
        assert kept == same
        assert old is not None
        assert new is not None
        assert new.shape != old.shape
        assert new.colour not in (old.colour, kept.colour if kept else None)
        assert changed.arrangement == scene.arrangement


def test_new_colours_leave_everything_in_its_place() -> None:
    rng = np.random.default_rng(0)
    some = scenes(8)
    new = [recoloured(scene, rng) for scene in some]
    old, other = (stilllife.render_full(s, 128) for s in (some, new))
    assert np.array_equal(old.masks, other.masks)
    assert all(a.a.colour != b.a.colour for a, b in zip(some, new, strict=True))


def test_real_pictures_overlap_with_their_own_truth_only() -> None:
    some = scenes(24)
    drawn = stilllife.render_full(some, 128)
    own = overlap(drawn.rgb, drawn.masks, some)
    others = overlap(np.roll(drawn.rgb, 1, axis=0), drawn.masks, None)
    assert own.mean() > 0.85
    assert others.mean() < 0.6


def test_the_cost_counts_both_branches_of_guidance() -> None:
    plain = cost(UNet(TINY_UNET), 32)
    told = cost(UNet(TINY_UNET.replace(guidance_embedding_size=64)), 32)
    assert plain["parameters"] == pytest.approx(4.28e6, rel=0.01)
    assert plain["flop_a_step"] == pytest.approx(2 * told["flop_a_step"], rel=0.01)


def test_the_page_has_what_is_kept() -> None:
    """The committed page is the one that the committed numbers make."""
    text = (family_page.DOCS / "family.md").read_text(encoding="utf-8")
    assert text == family_page.page()
    assert set(family_page.KEPT.glob("*.json")) <= {
        family_page.KEPT / f"{name}.json" for name in members()
    }
