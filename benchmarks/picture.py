"""One tiny picture in 25 steps, alone and sixteen at once, against diffusers.

    python -m benchmarks.picture

Both sides go from the sentence to pictures in memory (PIL), with the same weights, starting
noise, steps, solver and guidance; the pictures are compared before anything is timed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measure, tiny_model
from benchmarks.tiny_model import PROMPT
from safelight.diffusion.noise import initial_noise
from safelight.generate import Generator

SEED, STEPS, TARGET = 7, 25, 1.3


def main() -> None:
    parser = measure.options(__doc__ or "", rounds=7)
    parser.add_argument("--size", type=int, help="pixels a side; the model's own by default")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 16], help="pictures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = measure.Report("picture", f"One picture in {STEPS} steps")
    report.clean = measure.quiet(force=options.force)
    clock = measure.clock(options, report)
    model = tiny_model.tiny(report.notes)
    size = options.size or model.spec.native_size
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tiny"
        tiny_model.export(model, folder)
        eager = tiny_model.peer(folder)
        last = tiny_model.peer(folder, channels_last=True)
    generator = Generator(model)
    for count in options.counts:
        sides = {
            "safelight": lambda n=count: ours(generator, n, size),
            "diffusers": lambda n=count: theirs(eager, model, n, size),
            "diffusers, channels-last": lambda n=count: theirs(last, model, n, size),
        }
        apart = difference(sides["safelight"](), sides["diffusers"]())
        times = measure.in_turns(sides, rounds=options.rounds, clock=clock)
        name = f"{count} picture{'s' if count > 1 else ''} of {size}², DPM++ 2M"
        report.rows.append(measure.compare(name, times, target=TARGET, difference=apart))
    if not options.no_write:
        report.write()
    else:
        print(report.markdown())


def ours(generator: Generator, count: int, size: int) -> list[Any]:
    """Pictures of consecutive seeds."""
    scale = generator.model.spec.guidance_scale
    results = generator.generate(
        PROMPT,
        seed=SEED,
        count=count,
        steps=STEPS,
        guidance_scale=scale,
        sampler="dpm++2m",
        width=size,
        height=size,
    )
    return [result.image for result in results]


def theirs(pipe: Any, model: Any, count: int, size: int) -> list[Any]:
    """The same from the same noise."""
    cells = size // model.spec.vae.factor
    noise = torch.cat([initial_noise(SEED + k, (1, 4, cells, cells)) for k in range(count)])
    return pipe(
        [PROMPT] * count,
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=model.spec.guidance_scale,
        width=size,
        height=size,
    ).images


def difference(a: list[Any], b: list[Any]) -> str:
    """Mean absolute difference in 8-bit steps."""
    pairs = zip(a, b, strict=True)
    gap = np.mean([np.abs(np.asarray(x, float) - np.asarray(y, float)).mean() for x, y in pairs])
    return f"{gap:.3f}/255"


if __name__ == "__main__":
    main()
