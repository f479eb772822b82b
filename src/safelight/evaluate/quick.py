"""A first look at a UNet in training: sample its folder and print the judge's parts.

    python -m safelight.evaluate.quick --unet runs/tiny/v1 --clip runs/tiny/clip --vae runs/tiny/vae

``tuning`` is the list to watch; the others are for reports and must not choose anything.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from safelight.evaluate import prompts, report
from safelight.evaluate.judge import Judge
from safelight.evaluate.sampling import sampler
from safelight.evaluate.score import score_list
from safelight.evaluate.towers import autoencode, clip_features
from safelight.parts import load_text, load_unet, load_vae, load_vision


def main(arguments: list[str] | None = None) -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser(prog="python -m safelight.evaluate.quick")
    parser.add_argument("--unet", type=Path, required=True, help="folder with unet.* and schedule")
    parser.add_argument("--clip", type=Path, required=True, help="folder with text.*, tokenizer")
    parser.add_argument("--vae", type=Path, required=True, help="folder with vae.*")
    parser.add_argument("--judge", type=Path, help="judge.safetensors; default: the shipped one")
    parser.add_argument("--list", default="tuning", choices=list(prompts.DIGESTS))
    parser.add_argument("--n", type=int, default=256, help="prompts, from the list's start")
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", default="dpm++2m")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ceilings", action="store_true", help="also reconstructions and Fréchet")
    parser.add_argument("-o", "--output", type=Path, help="folder for numbers and sheets")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    text, tokenizer = load_text(options.clip)
    unet, schedule = load_unet(options.unet)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    vae, judge = load_vae(options.vae), Judge.load(options.judge)
    features = clip_features(load_vision(options.clip)) if options.ceilings else None

    def progress(stage: str, done: int, total: int) -> None:
        print(f"\r{stage} {done}/{total}", end="", file=sys.stderr, flush=True)

    for scale in options.guidance:
        began = time.monotonic()
        score = score_list(
            options.list,
            prompts.load(options.list, options.n),
            sampler(
                unet,
                schedule,
                text,
                tokenizer,
                vae,
                guidance_scale=scale,
                steps=options.steps,
                name=options.sampler,
            ),
            judge,
            autoencode=autoencode(vae) if options.ceilings else None,
            features=features,
            ceilings=options.ceilings,
            batch=options.batch,
            progress=progress,
        )
        print(file=sys.stderr)
        parts = {k: f"{c.value:.3f}" for k, c in score.generated.cells.items() if c.total}
        print(json.dumps({"guidance": scale, "n": len(score.prompts), **parts}))
        if options.ceilings:
            print(report.markdown([score]))
        print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
        if options.output is not None:
            report.write(
                options.output / f"guidance-{scale:g}",
                [score],
                guidance_scale=scale,
                steps=options.steps,
                sampler=options.sampler,
                unet=str(options.unet),
            )


if __name__ == "__main__":
    main()
