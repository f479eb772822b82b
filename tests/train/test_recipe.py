"""Recipes: every shipped one is valid, and mistakes name their field."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelight.errors import InvalidRequest
from safelight.train.loop import learning_rate
from safelight.train.recipe import KINDS, OptimRecipe, read_recipe, read_stages

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert all(stage.kind in KINDS for stage in read_stages(path))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"images": 0}, "images"),
        ({"optim": {"lr": -1}}, "optim.lr"),
        ({"optim": {"learning_rate": 1e-4}}, "optim.learning_rate"),
        ({"surprise": 1}, "surprise"),
        ({"steps": 10}, "recipe"),
        ({"distill": {"teacher": "x"}}, "recipe"),
    ],
)
def test_mistakes_name_the_field(change: dict, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_recipe(RECIPES / "tiny" / "vae.toml", **change)
    assert caught.value.field == field


def test_a_recipe_trains_exactly_one_thing(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text('name = "x"\noutput = "y"\nimages = 1\n')
    with pytest.raises(InvalidRequest, match="exactly one"):
        read_recipe(path)


def test_missing_file_and_bad_toml(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no file"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(InvalidRequest, match="not TOML"):
        read_recipe(tmp_path / "bad.toml")


def test_learning_rate_warms_up_holds_and_decays() -> None:
    optim = OptimRecipe(lr=1.0, warmup=100, decay=0.5)
    rates = [learning_rate(optim, seen, 1000) for seen in (0, 49, 100, 500, 750, 1000)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 1.0, 0.5, 0.0])
    cosine = optim.replace(decay_shape="cosine")
    assert learning_rate(cosine, 750, 1000) == pytest.approx(0.5)
    assert learning_rate(cosine, 625, 1000) == pytest.approx(0.8535533906)
