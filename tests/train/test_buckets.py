"""Training on pictures of many shapes: batches of one shape each, keyed by the picture's number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bucket_micro import fields, make_album, objective
from safelight.cli.main import main
from safelight.errors import InvalidRequest
from safelight.train.latent import LatentDiffusionObjective
from safelight.train.loop import Run
from safelight.train.recipe import Recipe, recipe_of
from safelight.train.rehearsal import small_parts


@pytest.fixture
def album(tmp_path: Path) -> Path:
    return make_album(tmp_path / "album")


def test_every_batch_has_one_shape_and_an_epoch_every_picture(album: Path, tmp_path: Path) -> None:
    made = objective(album, tmp_path / "run", offset_noise=0.1, input_perturbation=0.1)
    plan: Any = made.pictures._reader.plan  # type: ignore[attr-defined]
    shapes, shades = set(), []
    for start in range(0, 2 * len(plan), 2):
        batch = made.batch(start, 2)
        shapes.add(tuple(batch.latents.shape[-2:]))
        assert batch.noise.shape == batch.latents.shape == batch.seen_noise.shape
        assert bool(made.loss(made.module, batch)[0].isfinite())
        pixels = made.pictures.pixels(np.arange(start, start + 2), np.zeros(2, bool))
        assert batch.latents.shape[-2:] == (pixels.shape[-2] // 8, pixels.shape[-1] // 8)
        shades += [round(float(p[0, 0, 0] + 1) * 127.5) // 14 for p in pixels]
    # 64x16, 16x48, 48x16 and square, in cells of 8 pixels; nothing is nearest to 16x64.
    assert shapes == {(4, 4), (2, 8), (6, 2), (2, 6)}
    assert set(shades) == set(range(18)), "every picture, and not the broken one"
    assert len(shades) <= 18 + len(plan.members), "few of them twice, to fill a batch"


def test_masks_have_the_shape_of_their_batch(album: Path, tmp_path: Path) -> None:
    made = objective(album, tmp_path / "run", task="inpaint")
    for start in range(0, 16, 2):
        batch = made.batch(start, 2)
        assert batch.told.planes is not None
        assert batch.told.planes.shape == (2, 5, *batch.latents.shape[-2:])
        assert bool(made.loss(made.module, batch)[0].isfinite())


def test_a_picture_is_the_same_alone_and_in_its_batch(album: Path, tmp_path: Path) -> None:
    """What more processes than the recipe's see is what one sees."""
    made, other = (objective(album, tmp_path / "run") for _ in range(2))
    for start in (6, 0, 34):
        whole = made.batch(start, 2)
        for k in (1, 0):
            alone = other.batch(start + k, 1)
            for a, b in ((whole.latents, alone.latents), (whole.told.tokens, alone.told.tokens)):
                torch.testing.assert_close(a[k : k + 1], b, rtol=1e-5, atol=1e-5)
            assert torch.equal(whole.noise[k : k + 1], alone.noise)
            assert torch.equal(whole.t[k : k + 1], alone.t)


def test_an_interrupted_run_in_buckets_ends_in_the_same_bits(album: Path, tmp_path: Path) -> None:
    whole = Run(objective(album, tmp_path / "a").recipe, objective(album, tmp_path / "a"))
    whole.go()

    def die(seen: int, total: int, numbers: Any) -> None:
        if seen == 40:
            raise KeyboardInterrupt

    made = objective(album, tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        Run(made.recipe, made, progress=die).go()
    made = objective(album, tmp_path / "b")
    again = Run(made.recipe, made)
    assert again.seen == 24
    again.go()
    for mine, theirs in ((whole.plain, again.plain), (whole.ema, again.ema)):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    listed = json.loads((tmp_path / "b" / "data.json").read_text())
    assert sum(listed["buckets"].values()) == 18
    assert [e["key"] for e in listed["skipped_listed"]] == ["18.png"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"source": "stilllife"}}, "the still life is square"),
        ({"data": {"crop": 16}}, "leave one out"),
        ({"data": {"size": 40}}, r"buckets\.step"),
        ({"data": {"buckets": {"stop": 16}}}, "buckets"),
        ({"compile": True}, "compile"),
        ({"diffusion": {"task": "depth"}}, "depth trains on squares"),
        ({"diffusion": {"task": "x4"}}, "x4 trains on squares"),
        ({"diffusion": None, "vae": {"vae": {"channels": [8, 8]}}}, "trains on squares"),
    ],
)
def test_buckets_that_make_no_sense_are_refused_by_name(
    change: dict[str, Any], said: str, album: Path, tmp_path: Path
) -> None:
    asked = fields(album, tmp_path)
    for name, value in change.items():
        asked[name] = (
            {**asked[name], **value} if isinstance(asked.get(name), dict) and value else value
        )
    with pytest.raises(InvalidRequest, match=said):
        recipe_of(asked, "test")


def test_networks_and_processes_that_buckets_do_not_fit(album: Path, tmp_path: Path) -> None:
    asked = fields(album, tmp_path)
    asked["data"]["buckets"] = {"step": 8}
    with pytest.raises(InvalidRequest, match=r"data\.buckets\.step.*16"):
        LatentDiffusionObjective(Recipe.model_validate(asked), frozen=small_parts(32, 8))
    asked["data"]["buckets"] = {"step": 16}
    asked["optim"] = {"batch": 4, "accumulation": 3}
    recipe = Recipe.model_validate(asked)
    assert recipe.share(3) == (4, 1)
    assert recipe.share(6) == (2, 1)
    with pytest.raises(InvalidRequest, match=r"data\.buckets.*4 processes"):
        recipe.share(4)  # three at once: from two batches of the plan


def test_a_dry_run_shows_the_buckets(
    album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""name = "many"
output = "{tmp_path}"
images = 8
[data]
source = "{album}"
size = 256
buckets = true
[diffusion]
clip = "a"
vae = "b"
unet = "sd-v1"
"""
    )
    with pytest.raises(SystemExit) as leaving:
        main(["train", str(path), "--dry-run"])
    assert not leaving.value.code
    document = json.loads(capsys.readouterr().out)
    assert {"256x256", "128x512", "320x192"} <= set(document["buckets"])
    assert document["recipe"]["data"]["buckets"]["step"] == 64
