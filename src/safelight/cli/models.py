"""``safelight models``: the models at hand, and writing one as a published folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from safelight.cli import original, show
from safelight.errors import InvalidRequest

app = typer.Typer(add_completion=False, invoke_without_command=True)


class Stored(StrEnum):
    """Number formats of an exported folder."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@app.callback()
def _models(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """List the models at hand: shipped ones, and those in the local hub cache."""
    if context.invoked_subcommand is not None:
        return
    found = [*_shipped(), *_cached()]
    if as_json:
        show.document({"schema": 1, "models": found})
        return
    for model in found:
        typer.echo(f"{model['name']:40} {model['kind']:8} {model['bytes'] / 2**20:9.1f} MiB")
    if not found:
        typer.echo("no models")


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="A shipped name, a folder, a file or a hub id.")],
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    dtype: Annotated[
        Stored, typer.Option("--dtype", help="Number format of the weights.")
    ] = Stored.float32,
    prior: Annotated[
        Path | None, typer.Option("--prior", help="A prior to put in front (unCLIP l).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Write a model as a folder in the published layout, which diffusers loads too."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidRequest("folder", f"{folder} is not empty.", "Name a new one.")
    from safelight.model import Model

    model = Model.load(name, device="cpu", prior=prior)
    write(model, folder, dtype.value)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    if as_json:
        show.document({"schema": 1, "name": model.spec.name, "folder": folder, "bytes": size})
    else:
        typer.echo(f"{model.spec.name}: {size / 2**20:.1f} MiB in {folder}")


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A folder or an original single file.")
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="DST", help="NAME.safetensors for a single file, else a folder."),
    ],
    dtype: Annotated[
        Stored | None, typer.Option("--dtype", help="Number format. [default: as it is]")
    ] = None,
    ema: original.Ema = None,
    prediction_type: original.Prediction = None,
    family: original.Family = None,
    layers: original.Layers = None,
    tokenizer: original.TokenizerPlace = None,
    clip_stats: original.ClipStats = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Turn a published folder into an original single file, or the other way round."""
    from safelight import convert as work

    how = original.given(ema, prediction_type, family, layers, tokenizer, clip_stats)
    done = work.convert(source, target, dtype=None if dtype is None else dtype.value, **how)
    if as_json:
        show.document({"schema": 1, **done})
        return
    for note in done["notes"]:
        show.words().print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    typer.echo(f"{done['name']} ({done['family']}): {done['bytes'] / 2**20:.1f} MiB in {target}")


def write(model: Any, folder: Path, dtype: str | None = None) -> None:
    """See :func:`safelight.convert.write_model`."""
    from safelight.convert import write_model

    write_model(model, folder, dtype=dtype)


def _shipped() -> list[dict[str, Any]]:
    from safelight import shipped

    def size(name: str) -> int:
        files = (shipped.FAMILY / name).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    return [{"name": n, "kind": "shipped", "bytes": size(n)} for n in shipped.names()]


def _cached() -> list[dict[str, Any]]:
    """Models of the family in the local hub cache. Asks no network."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return [
        {"name": repo.repo_id, "kind": "cached", "bytes": repo.size_on_disk}
        for repo in sorted(repos, key=lambda r: r.repo_id)
        if repo.repo_type == "model"
        and any(f.file_name == "model_index.json" for r in repo.revisions for f in r.files)
    ]
