"""``safelight upscale``: a picture four times as large a side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from safelight.cli import naming
from safelight.cli.generate import Dtype, looks, shoot
from safelight.request import GenerateRequest


def command(
    image: Annotated[str, typer.Argument(help="A path, - or an http(s) address.")],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="What it shows.")] = "",
    negative_prompt: Annotated[str, typer.Option("-n", "--negative-prompt")] = "",
    noise_level: Annotated[
        int | None,
        typer.Option("--noise-level", help="0 to 350: how much may be invented. [default: 20]"),
    ] = None,
    model: Annotated[
        str, typer.Option("-m", "--model", help="A model of the x4 upscaler's family.")
    ] = "x4-upscaler",
    steps: Annotated[int | None, typer.Option("--steps", help="[default: card's]")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "--scale", help="[default: card's]")
    ] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="In any spelling.")] = None,
    eta: Annotated[float | None, typer.Option("--eta", help="Fresh noise a step, 0 to 1.")] = None,
    seed: Annotated[int, typer.Option("-s", "--seed", help="-1 draws one.")] = -1,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A file or a folder. [default: outputs]")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps.")] = None,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="Of the networks.")] = None,
    metadata: Annotated[
        bool, typer.Option("--metadata/--no-metadata", help="Settings in the file.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet")] = False,
) -> None:
    """Make a picture four times as large a side, its details invented anew."""
    request = GenerateRequest.from_kwargs(
        **looks([image]),
        prompt=prompt,
        negative_prompt=negative_prompt,
        noise_level=noise_level,
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        eta=eta,
        seed=seed,
    )
    machine: dict[str, Any] = {"device": device, "dtype": None if dtype is None else dtype.value}
    saving = {"metadata": metadata}
    places = naming.plan(output, None, None)
    shoot(request, model, places, machine, saving, as_json=as_json, quiet=quiet)
