"""Every recipe that is shipped holds together: numbers of its card, and steps in miniature."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from safelight.cli.main import main
from safelight.errors import InvalidRequest
from safelight.train.recipe import Recipe, read_recipe, read_stages
from safelight.train.rehearsal import miniature, rehearse

RECIPES = Path(__file__).parents[2] / "recipes"
CARDS = {p.stem: p for p in sorted((RECIPES / "cards").glob("*.toml"))}
STEPS = int(os.environ.get("SAFELIGHT_REHEARSAL_STEPS", "1"))
"""20 before a release; one finds what does not fit."""

# name: (stages as (steps, size, filter), global batch, learning rate, warm-up steps)
PUBLISHED = {
    "v1-1": ([(237_000, 256, ""), (194_000, 512, "laion-high-resolution")], 2048, 1e-4, 10_000),
    "v1-2": ([(515_000, 512, "laion-improved-aesthetics")], 2048, 1e-4, 10_000),
    "v1-3": ([(195_000, 512, "laion-improved-aesthetics")], 2048, 1e-4, 10_000),
    "v1-4": ([(225_000, 512, "laion-aesthetics-v2-5plus")], 2048, 1e-4, 10_000),
    "v1-5": ([(595_000, 512, "laion-aesthetics-v2-5plus")], 2048, 1e-4, 10_000),
    "v2-base": ([(550_000, 256, "sd-v2-256"), (850_000, 512, "sd-v2-512")], 2048, 1e-4, 10_000),
    "v2-768-v": ([(150_000, 512, "sd-v2-512"), (140_000, 768, "sd-v2-768")], 2048, 1e-4, 10_000),
    "v2-depth": ([(200_000, 512, "sd-v2-512")], 2048, 1e-4, 10_000),
    "v2-inpainting": ([(200_000, 512, "sd-v2-512")], 2048, 5e-5, 10_000),
    "v2-x4-upscaling": ([(1_250_000, 2048, "sd-x4")], 2048, 1e-4, 10_000),
    "image-variations": ([(87_000, 512, "improved-aesthetics-6plus")], 24, 1e-4, 1_000),
    "small": (
        [
            (500_000, 512, "laion2b-en-aesthetic"),
            (400_000, 512, "laion2b-en-aesthetic"),
            (200_000, 512, "laion2b-en-aesthetic"),
        ],
        128,
        1e-5,
        None,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_card_recipe_has_its_cards_numbers(name: str) -> None:
    stages, batch, rate, warmup = PUBLISHED[name]
    made = read_stages(CARDS[name])
    assert [(r.steps, r.data.size, r.data.filter) for r in made] == stages
    for recipe in made:
        assert recipe.optim.step == batch
        assert recipe.images == recipe.steps * batch
        assert (recipe.optim.lr, recipe.optim.decay) == (rate, 0.0)
        assert warmup is None or recipe.optim.warmup == warmup * batch
        assert recipe.diffusion is not None
        size = recipe.data.crop or recipe.data.size
        factor = 4 if recipe.diffusion.task == "x4" else 8
        assert recipe.diffusion.unet.sample_size * factor == size


def test_the_tree_of_the_cards() -> None:
    drops = {}
    for name in ("v1-1", "v1-2", "v1-3", "v1-4", "v1-5"):
        last = read_stages(CARDS[name])[-1]
        assert last.diffusion is not None
        drops[name] = last.diffusion.drop_caption
        assert last.diffusion.prediction_type == "epsilon"
    assert list(drops.values()) == [0.0, 0.0, 0.1, 0.1, 0.1], "dropping only from 1-3 on"
    for name in ("v1-3", "v1-4", "v1-5"):
        assert read_recipe(CARDS[name]).start == Path("runs/cards/v1-2")
    first, second = read_stages(CARDS["v1-1"])
    assert second.start == first.output == Path("runs/cards/v1-1/256")
    assert [r.diffusion.prediction_type for r in read_stages(CARDS["v2-768-v"])] == ["v", "v"]  # type: ignore[union-attr]
    small = read_stages(CARDS["small"])
    assert [r.optim.warmup // 128 for r in small] == [10_000, 5_000, 5_000]
    assert small[0].distill is None
    assert [(r.distill.soft, r.distill.hard, r.distill.match) for r in small[1:]] == [  # type: ignore[union-attr]
        (0.5, 0.5, 0.0),
        (0.5, 0.5, 0.1),
    ]
    assert [r.distill.teacher.name for r in small[1:]] == ["v1-4", "v1-5"]  # type: ignore[union-attr]
    assert "accumulation 1" in CARDS["v2-base"].read_text(), "the v2 card's slip is noted"


def stages() -> list[Recipe]:
    """All there are; of those that differ in lengths, data and rates only, the first."""
    found: dict[object, Recipe] = {}
    for path in sorted(RECIPES.rglob("*.toml")):
        for recipe in read_stages(path):
            settings = recipe.diffusion
            if settings is not None:
                lesson = recipe.distill and (recipe.distill.kind, recipe.distill.match)
                told = (settings.task, settings.prediction_type, settings.train, lesson)
                shape = (recipe.data.size, recipe.data.crop, recipe.start is None)
                found.setdefault((told, shape, miniature(settings.unet)), recipe)
            elif recipe.prior is not None:
                found[recipe.name] = recipe
    return list(found.values())


@pytest.mark.parametrize("recipe", stages(), ids=lambda r: r.output.as_posix()[5:])
def test_a_recipe_runs_in_miniature_at_its_shapes(recipe: Recipe) -> None:
    assert len(rehearse(recipe, STEPS)) == STEPS


def test_a_recipe_that_does_not_hold_together_is_found() -> None:
    recipe = read_recipe(CARDS["v2-depth"])
    assert recipe.diffusion is not None
    unet = recipe.diffusion.unet.replace(in_channels=4)
    broken = recipe.replace(diffusion=recipe.diffusion.replace(unet=unet))
    with pytest.raises(InvalidRequest, match="in_channels"):
        rehearse(broken, 1)
    with pytest.raises(InvalidRequest, match=r"data\.size"):
        rehearse(recipe.replace(data=recipe.data.replace(size=520)), 1)


def test_a_dry_run_prints_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["train", str(CARDS["small"]), "--dry-run"])
    assert not leaving.value.code
    document = json.loads(capsys.readouterr().out)
    assert [s["recipe"]["name"] for s in document["stages"]] == ["small-1", "small-2", "small-3"]
    assert [s["steps"] for s in document["stages"]] == [500_000, 400_000, 200_000]


def test_mistakes_in_stages_name_their_key(tmp_path: Path) -> None:
    text = CARDS["small"].read_text()
    path = tmp_path / "small.toml"
    path.write_text(text.replace("soft = 0.5", "sofd = 0.5"))
    with pytest.raises(InvalidRequest) as caught:
        read_stages(path)
    assert caught.value.field == "distill.sofd"
    path.write_text(text.replace('unet = "small"', 'unet = "smal"'))
    with pytest.raises(InvalidRequest, match=r"diffusion\.unet.*no published size"):
        read_stages(path)
    with pytest.raises(InvalidRequest, match="several runs"):
        read_recipe(CARDS["small"])
