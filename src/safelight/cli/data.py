"""``safelight data``: filter tables of pictures, index and search them, find duplicates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.errors import InvalidRequest

if TYPE_CHECKING:
    from safelight.data.filters import Filter, FilterReport

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def _data() -> None:
    """Filter, search and de-duplicate training pictures."""


def _progress(unit: str) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
        TimeElapsedColumn(), console=Console(stderr=True), transient=True,
    )  # fmt: skip


# -- filter -----------------------------------------------------------------------------------


@app.command()
def filters() -> None:
    """The named filters: the queries of the model cards and of LAION's own subsets."""
    from rich.console import Console
    from rich.table import Table

    from safelight.data.filters import FILTERS, rules_of

    table = Table("name", "keeps", "from")
    for name, entry in FILTERS.items():
        rules = [r for r in rules_of(entry.filter) if r.name not in ("url", "caption")]
        table.add_row(name, "\n".join(f"{r.name} {r.text}" for r in rules), entry.source)
    Console().print(table)


@app.command()
def filter(
    tables: Annotated[
        list[Path], typer.Argument(help="Parquet, JSONL, CSV or TSV files, or folders of them.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The list: .parquet, .jsonl, .csv, .txt. Default: count only."
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option("-p", "--preset", help="A name of `safelight data filters`.")
    ] = None,
    min_side: Annotated[int | None, typer.Option(help="Smallest width and height.")] = None,
    max_aspect: Annotated[float | None, typer.Option(help="Longest side over shortest.")] = None,
    aesthetic_min: Annotated[float | None, typer.Option(help="Score at least this.")] = None,
    aesthetic_above: Annotated[float | None, typer.Option(help="Score above this.")] = None,
    predictor: Annotated[
        str | None, typer.Option(help="Whose score: v1, v2 or any (what is there).")
    ] = None,
    watermark_below: Annotated[float | None, typer.Option(help="pwatermark below this.")] = None,
    punsafe_below: Annotated[float | None, typer.Option(help="punsafe below this.")] = None,
    similarity_min: Annotated[
        float | None, typer.Option(help="CLIP similarity of picture and text at least this.")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="A language code to keep; may be repeated.")
    ] = None,
    nsfw: Annotated[
        list[str] | None, typer.Option(help="An NSFW tag to keep (UNLIKELY); may be repeated.")
    ] = None,
    min_caption: Annotated[int | None, typer.Option(help="Fewest characters of a caption.")] = None,
    missing: Annotated[
        str | None, typer.Option(help="Rows that lack a value that is asked about: drop or keep.")
    ] = None,
    rejected: Annotated[
        Path | None, typer.Option(help="Where the other rows go, each with its rule.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Where the report goes, as JSON.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")] = False,
) -> None:
    """Keep the rows of LAION-style tables that a query asks for. Options go beyond the preset's."""
    from safelight.data.filters import run_filter, save_report

    spec = _spec(
        preset,
        min_side=min_side, max_aspect=max_aspect, aesthetic_min=aesthetic_min,
        aesthetic_above=aesthetic_above, predictor=predictor, watermark_below=watermark_below,
        punsafe_below=punsafe_below, similarity_min=similarity_min,
        languages=tuple(language) if language else None, nsfw=tuple(nsfw) if nsfw else None,
        min_caption=min_caption, missing=missing,
    )  # fmt: skip
    with _progress("rows") as bar:
        task = bar.add_task("filter", total=None)
        result = run_filter(
            tables, spec, output, rejected=rejected, progress=lambda n: bar.advance(task, n)
        )
    if report is not None:
        save_report(result, report)
    if json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        _show(result)


def _spec(preset: str | None, **options: Any) -> Filter:
    """The preset's filter with the options that were given put over it."""
    from pydantic import ValidationError

    from safelight.data.filters import Filter, named

    given = {name: value for name, value in options.items() if value is not None}
    base = named(preset).model_dump() if preset else {}
    if "aesthetic_min" in given:  # the two are one question
        base.pop("aesthetic_above", None)
    if "aesthetic_above" in given:
        base.pop("aesthetic_min", None)
    if not preset and not given:
        raise InvalidRequest("preset", "no rule is given.", "See `safelight data filters`.")
    try:
        return Filter.model_validate({**base, **given})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(field.replace("_", "-"), f"{first['msg']}.") from error


def _show(report: FilterReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("rule", "keeps", "column", "removed", "fail it", "no value")
    for rule in report.rules:
        table.add_row(
            rule.name, rule.text, rule.column, f"{rule.removed:,}", f"{rule.failing:,}",
            f"{rule.missing:,}",
        )  # fmt: skip
    Console().print(table)
    share = 100 * report.kept / max(1, report.rows)
    typer.echo(f"{report.kept:,} of {report.rows:,} rows kept ({share:.2f} %)")
    _show_bad(report.bad, report.bad_listed)
    for note in report.notes:
        typer.echo(f"Note: {note}")
    if report.img2dataset:
        typer.echo(f"{report.output}; download with:\n{report.img2dataset}")


def _show_bad(count: int, listed: Any, shown: int = 5) -> None:
    if count:
        typer.echo(f"{count:,} could not be read and were passed over:", err=True)
        for entry in list(listed)[:shown]:
            typer.echo(f"  {entry['where']}: {entry['why']}", err=True)


# -- what is in a source ----------------------------------------------------------------------

_Path = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A folder, a .tar or .parquet, shards/{000..127}.tar, or stilllife:SPLIT:SEED:COUNT.",
    ),
]
_Caption = Annotated[str | None, typer.Option(help="Column or field that holds the captions.")]
_Split = Annotated[str | None, typer.Option(help="Of a `datasets` folder with several.")]
_Exclude = Annotated[Path | None, typer.Option(help="A list of keys to leave out, one a line.")]
_Clip = Annotated[
    str | None,
    typer.Option(help="Folder of a CLIP: a run's or a published CLIPModel's. Default: tiny's."),
]
_Report = Annotated[Path | None, typer.Option(help="Where the report goes, as JSON.")]


@app.command()
def check(
    path: _Path,
    caption: _Caption = None,
    split: _Split = None,
    exclude: _Exclude = None,
    min_side: Annotated[int, typer.Option(help="Smaller pictures count as bad.")] = 0,
    size: Annotated[int, typer.Option(help="Side of the square aspect bucket.")] = 512,
    report: _Report = None,
    json: Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")] = False,
) -> None:
    """Read every picture and caption: how many there are, their shapes, and which are bad."""
    from safelight.data.check import check_source
    from safelight.data.sources import open_source

    source = open_source(path, caption=caption, split=split, exclude=exclude)
    with _progress("pictures") as bar:
        task = bar.add_task("check", total=len(source))
        result = check_source(
            source, min_side=min_side, size=size, progress=lambda n: bar.advance(task, n)
        )
    _save(result, report)
    if json:
        typer.echo(result.model_dump_json(indent=2))
        return
    typer.echo(f"{result.good:,} of {result.samples:,} pictures of {path} can be used")
    for shape, count in result.buckets.items():
        typer.echo(f"  {shape:>11}  {count:,}")
    _show_bad(result.bad, result.bad_listed)


@app.command()
def dedup(
    path: _Path,
    drop: Annotated[Path | None, typer.Option(help="Where the list of keys to drop goes.")] = None,
    report: _Report = None,
    sheet: Annotated[
        Path | None, typer.Option(help="A picture of the groups found, to judge the limits by.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="exact, perceptual or embedding; may be repeated. Default: all three."),
    ] = None,
    hamming: Annotated[int, typer.Option(min=0, max=127, help="Most bits of 256 apart.")] = 24,
    cosine: Annotated[float, typer.Option(min=0, max=1, help="Least cosine of embeddings.")] = 0.98,
    mirrored: Annotated[bool, typer.Option("--mirrored", help="Also mirror images.")] = False,
    clip: _Clip = None,
    caption: _Caption = None,
    split: _Split = None,
    exclude: _Exclude = None,
    json: Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")] = False,
) -> None:
    """Find duplicates: equal files, pictures that look alike, pictures that mean the same."""
    from safelight.data import duplicates
    from safelight.data.sources import open_source

    methods = tuple(method or duplicates.METHODS)
    if wrong := [m for m in methods if m not in duplicates.METHODS]:
        raise InvalidRequest(
            "method", f"unknown {wrong[0]!r}.", f"One of {', '.join(duplicates.METHODS)}."
        )
    _check_sheet(sheet)
    source = open_source(path, caption=caption, split=split, exclude=exclude)
    towers = None
    if "embedding" in methods:
        from safelight.data.clip import load_clip

        towers = load_clip(clip)
    with _progress("pictures") as bar:
        task = bar.add_task("dedup", total=len(source))
        result = duplicates.find_duplicates(
            source, methods, hamming=hamming, cosine=cosine, mirrored=mirrored,  # type: ignore[arg-type]
            embed=towers.pictures if towers else None, clip=towers.name if towers else None,
            progress=lambda n: bar.advance(task, n),
        )  # fmt: skip
    _save(result, report)
    if drop is not None:
        duplicates.save_drop_list(result, drop)
    if sheet is not None:
        _save_groups(result, source, sheet)
    if json:
        typer.echo(result.model_dump_json(indent=2))
        return
    found = ", ".join(f"{name} {count:,}" for name, count in result.found.items())
    typer.echo(
        f"{len(result.drop):,} of {result.samples:,} pictures are copies ({found}) of "
        f"{len(result.groups):,} others; {result.kept:,} stay"
    )
    _show_bad(result.bad, result.bad_listed)


def _check_sheet(path: Path | None) -> None:
    from safelight.store.pictures import FORMATS

    if path is not None and path.suffix.lower() not in FORMATS:
        raise InvalidRequest("output", f"cannot write {path}.", f"Use {', '.join(FORMATS)}.")


def _save(report: Any, path: Path | None) -> None:
    from safelight.data.filters import save_report

    if path is not None:
        save_report(report, path)


def _save_groups(result: Any, source: Any, path: Path, most: int = 24) -> None:
    """Each group in a row: what stays, then up to five of what goes."""
    from safelight.data.sheet import picture_sheet
    from safelight.store.pictures import save

    places = {source.key(i): i for i in range(len(source))}
    pictures, words = [], []
    for group in result.groups[:most]:
        row = [(group.keep, f"stays: {group.keep}")]
        row += [(d.key, f"{d.method} {d.measure:g}: {d.key}") for d in group.drop[:5]]
        pictures += [source.picture(places[key]) for key, _ in row] + [None] * (6 - len(row))
        words += [text for _, text in row] + [""] * (6 - len(row))
    if pictures:
        save(path, picture_sheet(pictures, words, size=144, columns=6))


# -- search -----------------------------------------------------------------------------------


@app.command()
def index(
    path: _Path,
    output: Annotated[Path, typer.Option("-o", "--output", help="The index: a .npz file.")],
    clip: _Clip = None,
    caption: _Caption = None,
    split: _Split = None,
    exclude: _Exclude = None,
) -> None:
    """Embed every picture with a CLIP, for `search`."""
    from safelight.data.clip import load_clip
    from safelight.data.index import build_index
    from safelight.data.sources import open_source

    if output.suffix.lower() != ".npz":
        raise InvalidRequest("output", f"cannot write {output}.", "Name it .npz.")
    source = open_source(path, caption=caption, split=split, exclude=exclude)
    towers = load_clip(clip)
    with _progress("pictures") as bar:
        task = bar.add_task("index", total=len(source))
        result, bad = build_index(
            source, towers, caption=caption, split=split, progress=lambda n: bar.advance(task, n)
        )
    result.save(output)
    typer.echo(f"{len(result):,} pictures of {path}: {output}")
    _show_bad(bad.count, bad.listed)


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="Of `safelight data index`.")],
    text: Annotated[str | None, typer.Option("-t", "--text", help="What to look for.")] = None,
    image: Annotated[Path | None, typer.Option("-i", "--image", help="A picture like it.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the sheet goes.")] = Path(
        "search.png"
    ),
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many pictures.")] = 12,
    columns: Annotated[int, typer.Option(min=1, help="Pictures in a row.")] = 4,
    source: Annotated[
        str | None, typer.Option(help="Where the pictures are now, if they have moved.")
    ] = None,
    clip: _Clip = None,
    json: Annotated[
        bool, typer.Option("--json", help="What was found, as JSON on stdout.")
    ] = False,
) -> None:
    """The training pictures nearest to a text or a picture, as a sheet."""
    from json import dumps

    from safelight.data.clip import load_clip
    from safelight.data.index import Index, show
    from safelight.data.sheet import picture_sheet
    from safelight.store.pictures import open_picture, save

    if (text is None) == (image is None):
        raise InvalidRequest("text", "give either --text or --image.")
    if text is not None and not text.strip():
        raise InvalidRequest("text", "is empty.")
    _check_sheet(output)
    table = Index.load(index)
    query = None if image is None else open_picture(image)
    named = clip if clip is not None or table.about["clip"] == "tiny" else table.about["clip"]
    towers = load_clip(named)
    table.check(towers)
    vector = towers.words([text or ""]) if query is None else towers.pictures([query])
    hits = table.hits(vector[0], count)
    pictures = show(hits, table.source(source))
    words = [f"{hit.score:.3f} {hit.caption or hit.key}" for hit in hits]
    if query is not None:
        pictures, words = [query, *pictures], ["the picture that was given", *words]
    save(output, picture_sheet(pictures, words, columns=columns))
    if json:
        typer.echo(dumps([hit.model_dump() for hit in hits], indent=2, ensure_ascii=False))
        return
    for hit in hits:
        typer.echo(f"{hit.score:.3f}  {hit.key}  {hit.caption}")
    typer.echo(f"{len(hits)} of {len(table):,} pictures: {output}")
