"""``safelight plan``: what pictures of a size will take, before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli import show
from safelight.errors import InvalidRequest
from safelight.names import DEFAULT_MODEL

if TYPE_CHECKING:
    from safelight.spec import ModelSpec

PARTS = {
    "base": "Python and torch",
    "weights": "weights",
    "layouts": "weights in another layout",
    "unet": "one network call",
    "decoder": "decoding one picture",
    "pictures": "latents and pixels",
    "peak": "peak",
}


def command(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="A shipped name, a folder, a hub id in the cache, or "
                     "a published size (sd-v1, small, sd-v2-base, sd-v2-768)."),
    ] = DEFAULT_MODEL,
    size: Annotated[
        str | None, typer.Option(help="SIDE or WIDTHxHEIGHT in pixels. [default: the model's]")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:  # fmt: skip
    """Predict the memory that pictures take on a CPU in float32, by plan; say which plan fits."""
    spec = read_spec(model)
    width, height = _size(size, spec)
    found = _planned(spec, width, height, count)
    if as_json:
        show.document({"schema": 1, "model": spec.name, "width": width, "height": height,
                       "count": count, **found})  # fmt: skip
        return
    typer.echo(f"{spec.name}, {count} of {width}x{height}, float32 on a CPU; MiB, predicted")
    plans = found["plans"]
    typer.echo(f"{'':26}" + "".join(f"{name:>12}" for name in plans))
    for part, words in PARTS.items():
        cells = "".join(f"{each[part] / 2**20:12.0f}" for each in plans.values())
        typer.echo(f"{words:26}{cells}")
    if found["free"] is None:
        typer.echo(f"The system does not say what is free. Plan: {found['plan']}.")
    elif found["plan"] is None:
        typer.echo(f"{found['free'] / 2**20:.0f} MiB are free: no plan fits. Try a smaller size.")
    else:
        typer.echo(f"{found['free'] / 2**20:.0f} MiB are free. Plan: {found['plan']}.")


def read_spec(name: str) -> ModelSpec:
    """A model's spec without its weights.

    Raises:
        ModelNotFound, WeightsError: as for loading it.
    """
    from safelight import presets, shipped
    from safelight.spec import ModelSpec

    if (member := shipped.find(name)) is not None:
        return ModelSpec.model_validate(json.loads(member.read_text(encoding="utf-8"))["spec"])
    path = Path(name).expanduser()
    if not path.exists():
        sizes = {s.name: s for s in vars(presets).values() if isinstance(s, ModelSpec)}
        if name in sizes:
            return sizes[name]
        from safelight.store.hub import resolve

        path = Path(resolve(name, local_only=True).path)
    if path.is_dir():
        from safelight.store.folder import read_folder

        return read_folder(path).spec
    from safelight.store.single_file import read_single_file

    return read_single_file(path).spec


def _planned(spec: ModelSpec, width: int, height: int, count: int) -> dict[str, Any]:
    """Every plan's estimate, what is free, and the fastest plan that fits."""
    import torch

    from safelight.generate.generator import micro_batch
    from safelight.runtime.estimate import estimate
    from safelight.runtime.plan import PLAIN, everything

    device = torch.device("cpu")
    model: Any = SimpleNamespace(spec=spec, device=device)
    asked: Any = SimpleNamespace(width=width, height=height)
    together = micro_batch(model, [asked])
    plans: dict[str, dict[str, int]] = {}
    for name, plan in {"fast": everything(), "plain": PLAIN}.items():
        found = estimate(
            spec, width=width, height=height, count=count, together=together, plan=plan
        )
        plans[name] = {**dataclasses.asdict(found), "peak": found.peak}
    free = _free()
    fits = [name for name, each in plans.items() if free is None or each["peak"] <= free]
    return {"plans": plans, "free": free, "plan": fits[0] if fits else None, "together": together}


def _free() -> int | None:
    """Bytes that a program can have without others being pushed out; None where unknown."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return None


def _size(size: str | None, spec: ModelSpec) -> tuple[int, int]:
    if size is None:
        return spec.native_size, spec.native_size
    sides = size.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise InvalidRequest("size", f"{size!r} is no size.", "--size 768 or --size 768x512")
    width, height = int(sides[0]), int(sides[-1])
    factor = spec.vae.factor
    if width % factor or height % factor:
        raise InvalidRequest("size", f"{size} is not a multiple of {factor} pixels.")
    return width, height
