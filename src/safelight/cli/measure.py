"""``safelight evaluate metrics`` and the other measurements beside the prompt lists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from safelight.errors import InvalidRequest
from safelight.names import DEFAULT_MODEL

Clip = Annotated[
    str | None,
    typer.Option(help="A CLIP: a folder (CLIPModel's or a run's), or a model. Default: tiny's."),
]
Inception = Annotated[
    Path | None,
    typer.Option(help="TorchScript of Inception-v3 (inception-2015-12-05.pt), for its features."),
]
Json = Annotated[bool, typer.Option("--json", help="The numbers as JSON on stdout.")]


def metrics(
    pictures: Annotated[str, typer.Argument(help="Folder, shards or tables: those to measure.")],
    reference: Annotated[str, typer.Argument(help="The same: those to compare them with.")],
    metric: Annotated[
        str | None,
        typer.Option(help="frechet,kid,cmmd,precision-recall,clip-score. Default: all that can."),
    ] = None,
    clip: Clip = None,
    inception: Inception = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Only the first of each.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A .json file.")] = None,
    json: Json = False,
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


def pareto(
    model: Annotated[
        list[str] | None, typer.Option("-m", "--model", help="May be repeated. Default: tiny.")
    ] = None,
    coco: Annotated[Path | None, typer.Option(help="captions_val2017.json, as the cards.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="COCO's pictures: the folder val2017.")
    ] = None,
    list_: Annotated[
        str, typer.Option("--list", help="Without --coco: a list of still life.")
    ] = "held_out",
    count: Annotated[
        int | None, typer.Option(min=4, help="Prompts. Default: 10,000 of COCO, all of a list.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of captions.")] = 0,
    scales: Annotated[
        str | None, typer.Option(help="Guidance scales. Default: the cards' 1.5,2,3,4,5,6,7,8.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 50,
    sampler: Annotated[
        str | None, typer.Option(help="Default: PLMS for models like v1, DDIM like v2.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side. Default: 512 for COCO, or native.")
    ] = None,
    distance: Annotated[str, typer.Option(help="Of the figure: frechet, kid or cmmd.")] = "frechet",
    clip: Clip = None,
    inception: Inception = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 50,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder; points in it are not measured again.")
    ] = Path("outputs/pareto"),
) -> None:
    """The cards' figure: distance against CLIP score over guidance scales, for many models.

    Every point is written when it is measured; the same command goes on where it was cut off.
    """
    from safelight import names
    from safelight.evaluate import pareto as figure

    chosen = figure.scales(scales)
    if distance not in figure.DISTANCES:
        raise InvalidRequest("distance", f"no {distance!r}.", ", ".join(figure.DISTANCES))
    if sampler is not None:
        names.sampler(sampler)
    if coco is None and images is not None:
        raise InvalidRequest("images", "belongs to --coco.", "Give both, or neither.")
    if coco is not None and images is None:
        raise InvalidRequest("images", "is missing.", "Give COCO's pictures: --images val2017.")
    figure.check_plot()

    import safelight
    from safelight.evaluate import briefs
    from safelight.evaluate.features import inception_extractor, named_clip

    if coco is not None and images is not None:
        brief = briefs.coco(coco, images, count, seed=seed, size=size)
    else:
        brief = briefs.still_life(list_, count, size=size)
    network = None if inception is None else inception_extractor(inception)
    points = []
    with Bar() as bar:
        sweep = figure.Sweep(
            brief, named_clip(clip), inception=network, folder=output, batch=batch,
            progress=bar.update,
        )  # fmt: skip
        for name in dict.fromkeys(model or [DEFAULT_MODEL]):
            generator = safelight.load(name)
            for scale in chosen:
                settings = sweep.settings(name, generator, scale, steps, sampler)
                points.append(sweep.measure(settings, generator))
    features = sweep.extractors[-1].name
    words = figure.table(points, distance, features)
    (output / "pareto.md").write_text(words, encoding="utf-8")
    figure.plot(points, distance, features, output / "pareto.png")
    typer.echo(words)
    typer.echo(f"{output}/pareto.png, pareto.md and {figure.POINTS}")


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


class Bar:
    """A progress bar that learns its stages as they come."""

    def __enter__(self) -> Bar:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self._progress = Progress(
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._progress.start()
        self._tasks: dict[str, Any] = {}
        return self

    def update(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
