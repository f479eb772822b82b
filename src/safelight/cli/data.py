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
