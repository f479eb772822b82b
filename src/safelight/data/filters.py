"""The cards' queries over LAION-style tables, with a report of what each rule removed.

A filter is a list of rules over columns; a row stays if every rule holds. :data:`FILTERS` has the
queries that the model cards and LAION's own pages state. The kept rows are written as the list
that img2dataset takes (https://github.com/rom1504/img2dataset).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from safelight.data.tables import WORDS, Bad, Tables
from safelight.data.writers import open_writer
from safelight.errors import InvalidRequest
from safelight.spec import Record

Predictor = Literal["any", "v1", "v2"]


class Filter(Record):
    """Which rows of a table to keep. What is None is not asked."""

    min_side: int | None = Field(default=None, gt=0)
    """Smallest width and height, of the original picture."""
    max_aspect: float | None = Field(default=None, ge=1)
    """Longest side over shortest."""
    aesthetic_min: float | None = None
    """Keeps scores >= this."""
    aesthetic_above: float | None = None
    """Keeps scores > this."""
    predictor: Predictor = "any"
    """Whose aesthetic score is meant: LAION's first (``aesthetic``) or second
    (``AESTHETIC_SCORE``). The other is used, with a note, where only it is there."""
    watermark_below: float | None = None
    punsafe_below: float | None = None
    similarity_min: float | None = None
    languages: tuple[str, ...] = ()
    nsfw: tuple[str, ...] = ()
    """Tags of LAION's NSFW column to keep: UNLIKELY, UNSURE, NSFW."""
    min_caption: int = Field(default=1, ge=0)
    """Fewest characters of a caption."""
    missing: Literal["drop", "keep"] = "drop"
    """What becomes of a row that lacks a value that is asked about."""


class Named(NamedTuple):
    """A filter with a name, and where its query is stated."""

    filter: Filter
    source: str


FILTERS: dict[str, Named] = {
    "laion-high-resolution": Named(
        Filter(min_side=1024), "SD v1 cards: 170M of LAION-5B, resolution >= 1024x1024"
    ),
    "laion-improved-aesthetics": Named(
        Filter(min_side=512, aesthetic_above=5.0, watermark_below=0.5, predictor="v2"),
        "SD v1 cards: of laion2B-en, >= 512x512, score > 5.0, watermark < 0.5",
    ),
    "laion-aesthetics-v2-5plus": Named(
        Filter(aesthetic_min=5.0, predictor="v2"), "LAION-Aesthetics V2: 600M of 2B-en, score >= 5"
    ),
    "improved-aesthetics-6plus": Named(
        Filter(aesthetic_min=6.0, predictor="v2"),
        "LAION-Aesthetics V2: 12M, score >= 6 (image variations, small SD)",
    ),
    "laion2b-en-aesthetic": Named(
        Filter(aesthetic_above=7.0, watermark_below=0.8, punsafe_below=0.5, predictor="v1"),
        "LAION-Aesthetics V1: 52M, score > 7, watermark < 0.8, punsafe < 0.5 (small SD)",
    ),
    "laion-art": Named(
        Filter(aesthetic_above=8.0, watermark_below=0.8, punsafe_below=0.5, predictor="v1"),
        "LAION-Aesthetics V1: 8M, score > 8, watermark < 0.8, punsafe < 0.5 (small SD)",
    ),
    "laion-hd": Named(
        Filter(min_side=1024),
        "small SD's card names it without a query; read as laion-high-resolution",
    ),
    "sd-v2-256": Named(
        Filter(aesthetic_min=4.5, punsafe_below=0.1, predictor="v2"),
        "SD v2 card: punsafe=0.1, score >= 4.5, the 550k steps at 256x256",
    ),
    "sd-v2-512": Named(
        Filter(min_side=512, aesthetic_min=4.5, punsafe_below=0.1, predictor="v2"),
        "SD v2 card: the same with >= 512x512, the 850k steps at 512x512",
    ),
    "sd-v2-768": Named(
        Filter(min_side=768, aesthetic_min=4.5, punsafe_below=0.1, predictor="v2"),
        "SD v2 card: 768x768 subset; read as the same with >= 768x768",
    ),
    "sd-x4": Named(
        Filter(min_side=2049),
        "SD v2 card: the upscaler's 10M, > 2048x2048 (take 10M of what is kept)",
    ),
}
ALIASES = {
    "improved_aesthetics_6plus": "improved-aesthetics-6plus",
    "laion-aesthetics v2 5+": "laion-aesthetics-v2-5plus",
    "LAION-2B en aesthetic": "laion2b-en-aesthetic",
    "sd-v2": "sd-v2-512",
}


def named(name: str) -> Filter:
    """The filter of this name; case, spaces and underscores do not matter.

    Raises:
        InvalidRequest: there is none; the message lists them.
    """

    def plain(text: str) -> str:
        return text.lower().replace("_", "-").replace(" ", "-")

    for alias, full in ALIASES.items():
        if plain(alias) == plain(name):
            return FILTERS[full].filter
    for full, entry in FILTERS.items():
        if full == plain(name):
            return entry.filter
    raise InvalidRequest("preset", f"no filter {name!r}.", f"One of {', '.join(FILTERS)}.")


Values = dict[str, np.ndarray]


class Rule(NamedTuple):
    """One condition on a row."""

    name: str
    text: str
    """The condition in words, for the report."""
    columns: tuple[tuple[str, ...], ...]
    """What it reads: for each value the columns that may hold it, the preferred first."""
    holds: Callable[..., np.ndarray]
    """The values' arrays to a bool a row; nothing is missing in them."""


def rules_of(spec: Filter) -> list[Rule]:
    """The rules of a filter, in the order in which they are applied."""
    rules = [Rule("url", "is there", (("URL",),), lambda url: _lengths(url) > 0)]
    if spec.min_caption:
        n = spec.min_caption
        rules.append(
            Rule("caption", f"{n}+ characters", (("TEXT",),), lambda text: _lengths(text) >= n)
        )
    if spec.min_side is not None:
        side = spec.min_side
        rules.append(
            Rule("size", f">= {side}x{side}", (("WIDTH",), ("HEIGHT",)),
                 lambda w, h: (w >= side) & (h >= side))
        )  # fmt: skip
    if spec.max_aspect is not None:
        aspect = spec.max_aspect
        rules.append(
            Rule("aspect", f"<= {aspect:g}", (("WIDTH",), ("HEIGHT",)),
                 lambda w, h: (np.minimum(w, h) > 0)
                 & (np.maximum(w, h) <= aspect * np.minimum(w, h)))
        )  # fmt: skip
    scores = ("AESTHETIC_SCORE", "aesthetic")
    scores = scores[::-1] if spec.predictor == "v1" else scores
    for low, text, test in (
        (spec.aesthetic_min, ">=", np.greater_equal),
        (spec.aesthetic_above, ">", np.greater),
    ):
        if low is not None:
            rules.append(Rule("aesthetic", f"{text} {low:g}", (scores,), _against(test, low)))
    for name, column, text, limit, test in (
        ("watermark", "pwatermark", "<", spec.watermark_below, np.less),
        ("punsafe", "punsafe", "<", spec.punsafe_below, np.less),
        ("similarity", "similarity", ">=", spec.similarity_min, np.greater_equal),
    ):
        if limit is not None:
            text = f"{text} {limit:g}"
            rules.append(Rule(name, text, ((column,),), _against(test, limit)))
    for name, column, words in (
        ("language", "LANGUAGE", spec.languages),
        ("nsfw", "NSFW", spec.nsfw),
    ):
        if words:
            rules.append(Rule(name, " or ".join(words), ((column,),), _among(words)))
    return rules


def _lengths(words: np.ndarray) -> np.ndarray:
    return np.fromiter((len(w.strip()) for w in words), np.int64, len(words))


def _against(test: Any, limit: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: test(values, limit)


def _among(words: Sequence[str]) -> Callable[[np.ndarray], np.ndarray]:
    wanted = {w.lower() for w in words}
    return lambda values: np.fromiter(
        (v.strip().lower() in wanted for v in values), np.bool_, len(values)
    )


class RuleReport(Record):
    """What one rule did."""

    name: str
    text: str
    column: str
    """The columns that it read."""
    removed: int = 0
    """Rows that no earlier rule had removed."""
    failing: int = 0
    """Rows that it would remove on its own; ``removed`` depends on the order, this does not."""
    missing: int = 0
    """Rows without the value, in ``failing`` where these are dropped."""


class FilterReport(Record):
    """What a filter did, for people and for a data sheet."""

    rows: int
    kept: int
    rules: tuple[RuleReport, ...]
    files: tuple[str, ...]
    bad: int
    """Rows and files that could not be read."""
    bad_listed: tuple[dict[str, str], ...]
    notes: tuple[str, ...]
    output: str | None
    img2dataset: str | None
    """The command that downloads what was kept."""
    filter: Filter


def run_filter(
    paths: Sequence[str | Path],
    spec: Filter,
    output: str | Path | None = None,
    *,
    rejected: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> FilterReport:
    """Filter tables in one streaming pass.

    Args:
        paths: Parquet, JSONL, CSV and TSV files, or folders of them.
        spec: what to keep.
        output: ``.parquet``, ``.jsonl``, ``.csv``, or ``.txt`` (addresses alone); None only counts.
            It appears when it is complete.
        rejected: where the other rows go, with the rule that removed each in a column ``rule``.
        progress: called with the number of rows read since the last call.

    Raises:
        InvalidRequest: a path is wrong, or a column that a rule needs is in none of the tables.
        MissingExtra: pyarrow is not installed.
    """
    tables = Tables(paths, Bad())
    rules = rules_of(spec)
    _check_columns(tables, rules, spec)
    counts = [{"removed": 0, "failing": 0, "missing": 0} for _ in rules]
    rows = kept = 0
    keeper = open_writer(output, tables.schema, tables.files)
    refuser = None
    try:
        taken = [*tables.files, *([] if output is None else [Path(output)])]
        refuser = open_writer(rejected, tables.schema, taken, extra="rule")
        for index in range(len(tables.files)):
            for batch in tables.batches(index):
                keep, cause = _apply(batch, rules, spec, counts)
                rows, kept = rows + batch.num_rows, kept + int(keep.sum())
                keeper.write(batch, keep)
                refuser.write(batch, ~keep, [rules[c].name for c in cause[~keep]])
                if progress is not None:
                    progress(batch.num_rows)
    except BaseException:
        keeper.abandon()
        if refuser is not None:
            refuser.abandon()
        raise
    keeper.finish()
    refuser.finish()
    return FilterReport(
        rows=rows,
        kept=kept,
        rules=tuple(
            RuleReport(name=r.name, text=r.text, column=", ".join(_read(tables, r)), **c)
            for r, c in zip(rules, counts, strict=True)
        ),
        files=tuple(str(f) for f in tables.files),
        bad=tables.bad.count,
        bad_listed=tuple(tables.bad.listed),
        notes=tuple(_notes(tables, spec)),
        output=None if output is None else str(output),
        img2dataset=None if output is None else _command(Path(output), spec, tables.schema.names),
        filter=spec,
    )


def _check_columns(tables: Tables, rules: list[Rule], spec: Filter) -> None:
    have = tables.schema.names
    for rule in rules:
        for alternatives in rule.columns:
            if not set(alternatives) & set(have) and not (
                spec.missing == "keep" and rule.name != "url"
            ):
                others = ", ".join(have)
                raise InvalidRequest(
                    rule.name,
                    f"no table has a column {' or '.join(alternatives)}; there are {others}.",
                    "Leave the rule out, or keep rows without the value (missing = keep).",
                )


def _apply(
    batch: Any, rules: list[Rule], spec: Filter, counts: list[dict[str, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows stay, and the number of the rule that removed each of the others."""
    n = batch.num_rows
    keep, cause = np.ones(n, bool), np.full(n, -1)
    for number, (rule, count) in enumerate(zip(rules, counts, strict=True)):
        values = [_values(batch, alternatives) for alternatives in rule.columns]
        there = np.logical_and.reduce([known for _, known in values])
        fails = np.zeros(n, bool)
        if there.any():
            fails[there] = ~rule.holds(*(v[there] for v, _ in values))
        if spec.missing == "drop" or rule.name == "url":
            fails |= ~there
        count["missing"] += int((~there).sum())
        count["failing"] += int(fails.sum())
        count["removed"] += int((fails & keep).sum())
        cause[fails & keep] = number
        keep &= ~fails
    return keep, cause


def _values(batch: Any, alternatives: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A column's values, and where there is one; the first alternative that has it speaks."""
    n = batch.num_rows
    words = alternatives[0] in WORDS
    values = np.full(n, "", object) if words else np.full(n, np.nan)
    known = np.zeros(n, bool)
    for name in alternatives:
        if name not in batch.schema.names:
            continue
        column = batch.column(name).to_numpy(zero_copy_only=False)
        there = np.array([v is not None for v in column], bool) if words else np.isfinite(column)
        take = there & ~known
        values[take] = column[take]
        known |= there
    return values, known


def _read(tables: Tables, rule: Rule) -> list[str]:
    """The columns that a rule reads, as the files call them."""
    found: dict[str, None] = {}
    for alternatives in rule.columns:
        for names in tables.names:
            first = next((names[a] for a in alternatives if a in names), None)
            if first is not None:
                found[first] = None
    return list(found)


def _notes(tables: Tables, spec: Filter) -> list[str]:
    notes = []
    wanted = {"v1": "aesthetic", "v2": "AESTHETIC_SCORE"}.get(spec.predictor)
    asks = spec.aesthetic_min is not None or spec.aesthetic_above is not None
    if asks and wanted and any(wanted not in names for names in tables.names):
        notes.append(
            f"the query is about LAION's aesthetic predictor {spec.predictor}, whose scores its "
            f"files call {wanted}; a table without that column was read by the other score, "
            "which has another scale."
        )
    return notes


def _command(output: Path, spec: Filter, names: list[str]) -> str:
    if output.suffix.lower() == ".txt":
        return f"img2dataset --url_list {output} --input_format txt --output_format webdataset"
    kind = output.suffix.lower().removeprefix(".")
    more = [n for n in names if n not in ("URL", "TEXT", "WIDTH", "HEIGHT")]
    return (
        f"img2dataset --url_list {output} --input_format {kind} --url_col URL --caption_col TEXT"
        f" --output_format webdataset --output_folder {output.with_suffix('')}"
        f" --image_size {(spec.min_side or 512) // 64 * 64 or 64} --resize_mode keep_ratio"
        f" --resize_only_if_bigger True --save_additional_columns '{json.dumps(more)}'"
    )


def save_report(report: Record, path: str | Path) -> None:
    """Write a report as JSON; a reader never sees half of it."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)
