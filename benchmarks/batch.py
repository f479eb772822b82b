"""A file of mixed rows against the best batch there is, and against a loop in diffusers.

    python -m benchmarks.batch

64 rows of different prompts, seeds, steps and guidance scales, as `safelight batch` runs them: from
the file to synced pictures and a manifest. *Uniform* is as many pictures of one prompt with the
mean of the steps, in one call of :meth:`Generator.generate`, each encoded but not kept: the best
that the engine can do. *diffusers* is one call of its pipeline a row, on the same exported weights,
each picture saved as PNG. All in turns, in one process.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, serve, tiny_model
from safelight import provenance
from safelight.batch import runner
from safelight.diffusion.noise import initial_noise
from safelight.generate import Generator
from safelight.model import Model
from safelight.request import GenerateRequest

STEPS = (12, 16, 20, 24)


def main() -> None:
    parser = measure.options(__doc__ or "", rounds=3)
    parser.add_argument("--rows", type=int, default=64, help="of the file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = measure.Report("batch", f"{options.rows} mixed rows of a file")
    report.clean = measure.quiet(force=options.force)
    clock = measure.clock(options, report)
    model, asked = tiny_model.tiny(report.notes), serve.asked(options.rows, STEPS)
    generator = Generator(model)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        tiny_model.export(model, place / "tiny")
        pipe = tiny_model.peer(place / "tiny", channels_last=True)
        file = place / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in asked))
        folders = (place / f"out-{k}" for k in itertools.count())
        sides = {
            "safelight": lambda: by_file(generator, file, next(folders), len(asked)),
            "one uniform batch": lambda: uniform(generator, asked),
            "a loop in diffusers": lambda: loop(pipe, model, asked, next(folders)),
        }
        times = measure.in_turns(sides, rounds=options.rounds, clock=clock)
    for peer, target in (("one uniform batch", 0.9), ("a loop in diffusers", None)):
        pair = {"safelight": times["safelight"], peer: times[peer]}
        name = f"{options.rows} rows, against {peer}"
        report.rows.append(measure.compare(name, pair, target=target))
    for side, seconds in times.items():
        fastest = options.rows / min(seconds)
        report.notes.append(
            f"{side}: {measure.median_text(seconds)}, {fastest:.2f} rows/s at best."
        )
    if options.no_write:
        print(report.markdown())
    else:
        report.write()


def by_file(generator: Generator, file: Path, folder: Path, count: int) -> None:
    """What the command does once the model is loaded."""
    run = runner.Run(runner.Options(file, folder, seed=1))
    summary = run.finish(runner.Local(loader=lambda *_, **__: generator))
    assert summary.statuses["done"] == count, summary


def uniform(generator: Generator, asked: list[dict[str, Any]]) -> None:
    """As many pictures of one request, with the mean of the steps."""
    mean = round(sum(row["steps"] for row in asked) / len(asked))
    request = GenerateRequest(**{**asked[0], "steps": mean, "count": len(asked)})
    made = generator.generate(request=request)
    assert all(provenance.encode(result) for result in made)


def loop(pipe: Any, model: Model, asked: list[dict[str, Any]], folder: Path) -> None:
    """One call of the pipeline a row, as scripts do it."""
    cells = model.spec.native_size // model.spec.vae.factor
    folder.mkdir()
    for number, row in enumerate(asked):
        (image,) = pipe(
            row["prompt"],
            latents=initial_noise(row["seed"], (1, 4, cells, cells)),
            num_inference_steps=row["steps"],
            guidance_scale=row["guidance_scale"],
            width=model.spec.native_size,
            height=model.spec.native_size,
        ).images
        image.save(folder / f"{number}.png")


if __name__ == "__main__":
    main()
