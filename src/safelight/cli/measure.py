"""``safelight evaluate metrics`` and the other measurements beside the prompt lists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from safelight.errors import InvalidRequest

_Clip = Annotated[
    str | None,
    typer.Option(help="A CLIP: a folder (CLIPModel's or a run's), or a model. Default: tiny's."),
]
_Inception = Annotated[
    Path | None,
    typer.Option(help="TorchScript of Inception-v3 (inception-2015-12-05.pt), for its features."),
]
_Json = Annotated[bool, typer.Option("--json", help="The numbers as JSON on stdout.")]


def metrics(
    pictures: Annotated[str, typer.Argument(help="Folder, shards or tables: those to measure.")],
    reference: Annotated[str, typer.Argument(help="The same: those to compare them with.")],
    metric: Annotated[
        str | None,
        typer.Option(help="frechet,kid,cmmd,precision-recall,clip-score. Default: all that can."),
    ] = None,
    clip: _Clip = None,
    inception: _Inception = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Only the first of each.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A .json file.")] = None,
    json: _Json = False,
) -> None:
    """Distances between two sets of pictures, and how well captions fit, with 95 % intervals."""
    from safelight.data.sources import open_source
    from safelight.evaluate import sets
    from safelight.evaluate.features import inception_extractor, named_clip
    from safelight.evaluate.metrics import table

    names = None if metric is None else [n.strip() for n in metric.split(",") if n.strip()]
    sets.check(names)
    need_json(output)
    made, wanted = open_source(pictures), open_source(reference)
    network = None if inception is None else inception_extractor(inception)
    with progress("pictures") as bar:
        task = bar.add_task("features", total=None)
        results, bad = sets.compare(
            made, wanted, named_clip(clip), names=names, inception=network, limit=limit,
            progress=lambda n: bar.advance(task, n),
        )  # fmt: skip
    for source, left_out in zip((made, wanted), bad, strict=True):
        if left_out.count:
            typer.echo(f"{source.name}: {left_out.count} could not be read: left out", err=True)
    found = {
        "schema": 1,
        "pictures": pictures,
        "reference": reference,
        "unreadable": [b.count for b in bad],
        "metrics": [m.model_dump() for m in results],
    }
    finish(found, table(results), output, json)


def finish(found: dict[str, Any], words: str, output: Path | None, as_json: bool) -> None:
    """Write what was found, and say it."""
    from json import dumps

    text = dumps(found, indent=1, ensure_ascii=False)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
    typer.echo(text if as_json else words)


def progress(unit: str) -> Any:
    """A bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
        TimeElapsedColumn(), console=Console(stderr=True), transient=True,
    )  # fmt: skip


def need_json(output: Path | None) -> None:
    """Refuse another ending before the work, not behind it."""
    if output is not None and output.suffix.lower() != ".json":
        raise InvalidRequest("output", f"cannot write {output}.", "Name it .json.")
