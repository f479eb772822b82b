"""Every card recipe tried out: steps at its published shapes, in miniature widths.

``python -m benchmarks.rehearsals`` takes 20 steps of every stage of every recipe in
``recipes/cards/`` and keeps what came of it in ``results/``: an entry is written when its stage is
done, and the same command goes on where it was cut off. The test suite takes one step of each
(``SAFELIGHT_REHEARSAL_STEPS=20 pytest tests/train/test_cards.py`` takes 20).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, machine
from safelight.train.recipe import Recipe, read_stages
from safelight.train.rehearsal import rehearse

CARDS = Path(__file__).parents[1] / "recipes" / "cards"
FILE = RESULTS / "rehearsals.json"


def stages() -> list[Recipe]:
    """Of every card, in the order of their names."""
    return [stage for path in sorted(CARDS.glob("*.toml")) for stage in read_stages(path)]


def entry(recipe: Recipe, steps: int) -> dict[str, Any]:
    """What a rehearsal showed."""
    began = time.monotonic()
    losses = rehearse(recipe, steps)
    shape: dict[str, Any] = {"pixels": recipe.data.crop or recipe.data.size}
    if recipe.diffusion is not None:
        settings = recipe.diffusion
        shape |= {"task": settings.task, "latent_cells": settings.unet.sample_size}
    return {
        "stage": recipe.name,
        **shape,
        "steps": len(losses),
        "first_loss": round(losses[0], 5),
        "last_loss": round(losses[-1], 5),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--again", action="store_true", help="Forget what is kept.")
    options = parser.parse_args()
    kept: list[dict[str, Any]] = []
    if FILE.exists() and not options.again:
        kept = json.loads(FILE.read_text())["stages"]
    done = {e["stage"] for e in kept if e["steps"] >= options.steps}
    for recipe in stages():
        if recipe.name in done:
            continue
        kept = [e for e in kept if e["stage"] != recipe.name] + [entry(recipe, options.steps)]
        document = {"machine": machine(), "stages": sorted(kept, key=lambda e: e["stage"])}
        FILE.write_text(json.dumps(document, indent=1) + "\n")
        print(kept[-1], flush=True)


if __name__ == "__main__":
    main()
