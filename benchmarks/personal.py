"""How well a few pictures of one thing teach it, and what they cost: the three recipes, measured.

    safelight stilllife curio -o runs/personal/curio --count 6
    python -m benchmarks.personal --output runs/personal/report

Trains the recipes of ``recipes/personal`` that are named (a run that is finished, or was
interrupted, goes on where it is), then measures each beside the model before and real renders
(:mod:`safelight.evaluate.subject`): whether the thing is shown in scenes that no training picture
has, whether these are obeyed, and what became of its class. Writes ``report.json``, ``report.md``
and a sheet of pictures for each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from safelight.data.clip import load_clip
from safelight.evaluate import subject
from safelight.evaluate.judge import Judge
from safelight.evaluate.score import Generate
from safelight.generate import Generator, load
from safelight.train.recipe import Recipe, read_recipe

RECIPES = Path(__file__).parents[1] / "recipes" / "personal"
START = "from safelight.cli.main import main; main()"
NAMES = ("dreambooth", "dreambooth-no-prior", "lora")


def pictures_of(generator: Generator, more: dict[str, object]) -> Generate:
    """A model with its adapters, as a function of prompts and seeds."""

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        rows = []
        for start in range(0, len(prompts), 32):
            part = slice(start, start + 32)
            made = generator.generate(list(prompts[part]), seed=list(seeds[part]), **more)
            rows += [np.asarray(result.image) for result in made]
        return np.stack(rows)

    return generate


def trained(recipe: Recipe) -> Generate:
    """What came out of a recipe's run."""
    if recipe.personal is not None and recipe.personal.method == "lora":
        file = recipe.output / "pytorch_lora_weights.safetensors"
        return pictures_of(load(recipe.personal.model), {"loras": [(str(file), 1.0)]})
    return pictures_of(load(recipe.output), {})


def table(rows: dict[str, dict[str, float]]) -> str:
    """Rows of numbers as Markdown."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[n]:.3f}" if n in row else "" for n in names]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sheet(generate: Generate, path: Path) -> None:
    """Four pictures of each of the held-out prompts."""
    prompts = [prompt for prompt, _, _ in subject.held_out()]
    made = generate([p for p in prompts for _ in range(4)], [0, 1, 2, 3] * len(prompts))
    rows = [np.concatenate(list(made[i : i + 4]), axis=1) for i in range(0, len(made), 4)]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)


def main(arguments: list[str] | None = None) -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.personal")
    parser.add_argument("--recipes", nargs="+", default=list(NAMES), help="of recipes/personal")
    parser.add_argument("--each", type=int, default=8, help="pictures a prompt")
    parser.add_argument("--steps", type=int, help="instead of the recipes'")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, default=Path("runs/personal/report"))
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    vision, judge = load_clip(), Judge.load()

    def embed(pictures: np.ndarray) -> np.ndarray:
        return vision.pictures(Image.fromarray(p) for p in pictures)

    known = None
    rows: dict[str, dict[str, float]] = {}
    for name in options.recipes:
        file = RECIPES / f"{name}.toml"
        recipe = read_recipe(file)
        assert recipe.personal is not None
        if known is None:
            folder = recipe.personal.instance_data
            known = np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))])
            rows["real renders"] = subject.ceiling(known, embed, judge, each=options.each)
            base = pictures_of(load(recipe.personal.model), {})
            rows["before"] = subject.measure(base, known, embed, judge, each=options.each)
        command = [sys.executable, "-c", START, "personalize", str(file)]
        command += ["--steps", str(options.steps)] if options.steps else []
        command += ["--threads", str(options.threads)] if options.threads else []
        began = time.monotonic()
        subprocess.run(command, check=True)
        seconds = time.monotonic() - began
        made = trained(recipe)
        rows[name] = subject.measure(made, known, embed, judge, each=options.each)
        last = json.loads((recipe.output / "log.jsonl").read_text().splitlines()[-1])
        rows[name] |= {k: float(last[k]) for k in ("copies", "trained_percent", "seconds")}
        print(f"{name}: {seconds:.0f} s, {rows[name]}")
        sheet(made, options.output / f"{name}.png")
        (options.output / "report.json").write_text(json.dumps(rows, indent=1) + "\n")
        (options.output / "report.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
