"""``safelight vary``: pictures like other pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from safelight.cli import fast as fast_options
from safelight.cli import naming
from safelight.cli.generate import Dtype, both_sides, looks, shoot
from safelight.errors import InvalidRequest
from safelight.request import GenerateRequest


def command(
    image: Annotated[
        list[str], typer.Argument(help="Paths, - or http(s) addresses; several are mixed.")
    ],
    prompt: Annotated[
        str, typer.Option("-p", "--prompt", help="Beside the pictures (unCLIP).")
    ] = "",
    negative_prompt: Annotated[str, typer.Option("-n", "--negative-prompt")] = "",
    weights: Annotated[
        str | None, typer.Option("--weights", help="One a picture: 0.7,0.3. [default: equal]")
    ] = None,
    noise_level: Annotated[
        int | None, typer.Option("--noise-level", help="0 to 999: how far it may stray (unCLIP).")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option("--fit", help="CLIP sees the middle (crop), or all of it (square)."),
    ] = None,
    model: Annotated[
        str, typer.Option("-m", "--model", help="A model of image variations or unCLIP.")
    ] = "image-variations",
    steps: Annotated[int | None, typer.Option("--steps", help="[default: card's]")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "--scale", help="[default: card's]")
    ] = None,
    fast: fast_options.Fast = None,
    guidance_until: fast_options.Until = None,
    block_cache: fast_options.Cache = None,
    decoder: fast_options.Decoder = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="In any spelling.")] = None,
    eta: Annotated[float | None, typer.Option("--eta", help="Fresh noise a step, 0 to 1.")] = None,
    seed: Annotated[int, typer.Option("-s", "--seed", help="-1 draws one.")] = -1,
    size: Annotated[str | None, typer.Option("--size", help="512x512, or 512.")] = None,
    count: Annotated[int, typer.Option("-b", "--count", help="How many pictures.")] = 1,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A file or a folder. [default: outputs]")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps.")] = None,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="Of the networks.")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also a sheet of all pictures.")] = False,
    metadata: Annotated[
        bool, typer.Option("--metadata/--no-metadata", help="Settings in the file.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet")] = False,
) -> None:
    """Make pictures like other pictures.

    Image variations follow the pictures alone; unCLIP follows them and a prompt together.
    """
    width = height = None
    if size is not None:
        width, height = both_sides(size)
    levers = fast_options.fields(fast, None, guidance_until, False, block_cache, None, decoder)
    request = GenerateRequest.from_kwargs(
        **looks(image),
        **levers,
        prompt=prompt,
        negative_prompt=negative_prompt,
        image_weights=None if weights is None else _weights(weights),
        noise_level=noise_level,
        picture_fit=fit,
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        eta=eta,
        width=width,
        height=height,
        seed=seed,
        count=count,
    )
    machine: dict[str, Any] = {"device": device, "dtype": None if dtype is None else dtype.value}
    places = naming.plan(output, None, None)
    saving = {"metadata": metadata}
    shoot(request, model, places, machine, saving, grid=grid, as_json=as_json, quiet=quiet)


def _weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRequest("weights", f"{text!r} are no numbers.", "Write 0.7,0.3.") from None
