"""A run on the user's own pictures: read, held out, skipped, listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safelight.data.sources import Folder
from safelight.errors import InvalidRequest
from safelight.train.latent import LatentDiffusionObjective
from safelight.train.loop import Run
from safelight.train.pictures import Captioned, divided, open_pictures
from safelight.train.recipe import DataRecipe, Recipe
from safelight.train.rehearsal import WIDTH, small_parts


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """24 pictures of a shade each, one of them broken, with captions."""
    folder = tmp_path / "album"
    folder.mkdir()
    for k in range(24):
        shade = np.full((40, 56, 3), 10 * k, np.uint8)
        Image.fromarray(shade).save(folder / f"{k:02}.png")
        (folder / f"{k:02}.txt").write_text(f"shade {k}")
    (folder / "05.png").write_bytes(b"no picture")
    return folder


def test_pictures_and_captions_stay_together(album: Path) -> None:
    made = open_pictures(DataRecipe(source=str(album), size=32), seed=3)
    assert isinstance(made, Captioned)
    places, flips = made.places(0, 46)
    pixels = made.pixels(places, flips)
    captions = made.captions(places, flips, [])
    shades = ((pixels[:, 0, 16, 16] + 1) * 127.5).round().int().tolist()
    assert [f"shade {shade // 10}" for shade in shades] == captions
    assert len(set(captions)) >= 20
    assert "shade 5" not in captions
    report = made.report()
    assert report["skipped"] == 1
    assert report["skipped_listed"][0]["key"].startswith("05")
    again = open_pictures(DataRecipe(source=str(album), size=32), seed=3)
    assert again.captions(places[::-1], flips, []) == captions[::-1]
    assert again.digest() == made.digest()


def test_what_is_held_out_is_not_trained_on(album: Path) -> None:
    source = Folder(album)
    kept, apart = divided(source, 0.25)
    assert apart is not None
    names = [{part.key(k) for k in range(len(part))} for part in (kept, apart)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == len(source)
    assert 1 <= len(names[1]) <= 12
    (album / "99.png").write_bytes((album / "01.png").read_bytes())
    (album / "99.txt").write_text("one more")
    _, later = divided(Folder(album), 0.25)
    assert later is not None
    assert names[1] <= {later.key(k) for k in range(len(later))}
    assert divided(source, 0.0) == (source, None)


def test_a_filters_pictures_lie_in_a_folder_of_its_name(album: Path) -> None:
    with pytest.raises(InvalidRequest, match="safelight data filter --name laion-art"):
        open_pictures(DataRecipe(source=str(album), filter="laion-art"), seed=0)
    album.rename(album.parent / "laion-art")
    data = DataRecipe(source=str(album.parent), filter="laion-art", size=16, hold_out=0)
    made = open_pictures(data, seed=0)
    assert made.pixels(*made.places(0, 2)).shape == (2, 3, 16, 16)
    assert made.held_out("val", 8) is None


def test_a_run_on_them_lists_what_it_skipped(album: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "name": "own",
        "output": tmp_path / "run",
        "images": 64,
        "data": {"source": str(album), "size": 32, "hold_out": 0.25},
        "optim": {"batch": 16},
        "diffusion": {
            "clip": "none",
            "vae": "none",
            "unet": {
                "channels": [8, 8],
                "attention": [True, True],
                "heads": [1, 1],
                "only_cross_attention": [False, False],
                "layers_per_block": 1,
                "context_width": WIDTH,
                "norm_groups": 4,
                "sample_size": 4,
            },
        },
    }
    recipe = Recipe.model_validate(fields)
    objective: Any = LatentDiffusionObjective(recipe, frozen=small_parts(32, 8))
    numbers = Run(recipe, objective).go()
    assert set(numbers) >= {"loss_val"}
    listed = json.loads((tmp_path / "run" / "data.json").read_text())
    assert [entry["key"] for entry in listed["skipped_listed"]] == ["05.png"]
    assert listed["samples"] < 24
