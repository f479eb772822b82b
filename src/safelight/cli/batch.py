"""``safelight batch``: a file of requests into a folder of pictures."""

from __future__ import annotations

import csv
import logging
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from safelight.cli import adapters, show
from safelight.cli import fast as fast_options
from safelight.cli.generate import Dtype, both_sides
from safelight.errors import Cancelled, InvalidRequest, SafelightError
from safelight.inputs import MAX_BYTES
from safelight.names import DEFAULT_MODEL

if TYPE_CHECKING:
    from safelight.batch.runner import Maker, Run, Summary
    from safelight.generate import Cancel, Generator

_FORMATS = {"png": "PNG", "jpeg": "JPEG", "jpg": "JPEG", "webp": "WEBP"}
_EVERY = 30.0  # seconds between lines about progress where there is no terminal
_SHOWN = 5  # failed rows that are named at the end


def command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A .csv, .jsonl, .json, .parquet or .txt file.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder of the pictures.")],
    model: Annotated[
        str, typer.Option("-m", "--model", help="Of rows that name none.")
    ] = DEFAULT_MODEL,
    negative_prompt: Annotated[
        str | None, typer.Option("-n", "--negative-prompt", help="What pictures should not show.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", "--num-inference-steps", help="Sampling steps.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", "--cfg-scale", "--scale", help="The prompt's pull."),
    ] = None,
    fast: fast_options.Fast = None,
    sampler: Annotated[
        str | None, typer.Option("--sampler", help="In any program's spelling.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", "--scheduler", help="Spacing of the steps.")
    ] = None,
    width: Annotated[int | None, typer.Option("-W", "--width", help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option("-H", "--height", help="Pixels.")] = None,
    size: Annotated[str | None, typer.Option("--size", help="Both: 512x512, or 512.")] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help="How much of a row's image is made anew.")
    ] = None,
    weighting: Annotated[
        str | None, typer.Option("--prompt-dialect", "--weighting", help="none, a1111 or compel.")
    ] = None,
    count: Annotated[int | None, typer.Option("--count", "-b", help="Pictures of a row.")] = None,
    seed: Annotated[
        int | None,
        typer.Option("-s", "--seed", help="Of the run: rows without a seed draw theirs from it."),
    ] = None,
    same_seed: Annotated[
        bool, typer.Option("--same-seed", help="Rows without a seed use the run's own.")
    ] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="FILE[:SCALE]", help="An adapter; may be repeated."),
    ] = None,
    lora_dir: Annotated[
        list[Path] | None, typer.Option("--lora-dir", help="A folder whose files rows may name.")
    ] = None,
    embedding_dir: Annotated[
        list[Path] | None, typer.Option("--embedding-dir", help="The same for textual inversions.")
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other field; may be repeated."),
    ] = None,
    ignore: Annotated[
        bool, typer.Option("--ignore-columns", help="Pass over columns that are unknown.")
    ] = False,
    picture_format: Annotated[str, typer.Option("--format", help="png, jpeg or webp.")] = "png",
    metadata: Annotated[
        bool, typer.Option("--metadata/--no-metadata", help="Settings in the pictures' files.")
    ] = True,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps.")] = None,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="Of the networks.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Bit-equal pictures; one a network call.")
    ] = False,
    safety: Annotated[
        str | None,
        typer.Option("--safety", help="Flagged pictures: off, flag, blur, black or reject."),
    ] = None,
    safety_checker: Annotated[
        str | None, typer.Option("--safety-checker", help="A folder or a hub id, for any model.")
    ] = None,
    live: Annotated[
        int | None,
        typer.Option("--live", min=1, help="Pictures that share the networks. [default: by size]"),
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="local, or ray for many machines.")] = (
        "local"
    ),
    workers: Annotated[int, typer.Option("--workers", min=1, help="Of Ray.")] = 1,
    worker_cpus: Annotated[
        int, typer.Option("--worker-cpus", min=1, help="Cores of each, as Ray counts them.")
    ] = 1,
    ray_address: Annotated[
        str | None,
        typer.Option("--ray-address", help="Of a running cluster. [default: a new one]"),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what the folder holds of an earlier run.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try rows that failed once more.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every row; make nothing.")
    ] = False,
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="An index.html of the pictures.")
    ] = True,
    as_csv: Annotated[bool, typer.Option("--csv", help="Also a manifest.csv.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only the manifest's path.")] = False,
) -> None:
    """Make the pictures of a file of requests, one request a row.

    Columns are fields of a request in any program's spelling; options stand behind the columns.
    Run the same command again to go on where it was stopped, whatever stopped it.
    """
    # All of this before torch is imported: a wrong argument fails at once.
    csv.field_size_limit(2 * MAX_BYTES)  # cells may hold pictures; the process is the command's
    if picture_format not in _FORMATS:
        raise InvalidRequest("format", f"{picture_format!r} is unknown.", "png, jpeg or webp.")
    if engine not in ("local", "ray"):
        raise InvalidRequest("engine", f"{engine!r} is unknown.", "local or ray.")
    if device is not None and not re.fullmatch(r"(cpu|mps|cuda)(:\d+)?", device):
        raise InvalidRequest("device", f"{device!r} is unknown.", "One of cpu, cuda, mps.")
    if engine == "local" and (ray_address is not None or workers != 1):
        option = "workers" if ray_address is None else "ray-address"
        raise InvalidRequest(option, "is for --engine ray.", "Add it.")
    if size is not None:
        if width is not None or height is not None:
            raise InvalidRequest("size", "comes with a width or a height.", "Give one of them.")
        width, height = both_sides(size)
    fields = {
        "negative_prompt": negative_prompt,
        "steps": steps,
        "fast": fast,
        "guidance_scale": guidance_scale,
        "sampler": sampler,
        "schedule": schedule,
        "width": width,
        "height": height,
        "strength": strength,
        "weighting": weighting,
        "count": count,
        "loras": adapters.scaled(lora or ()) or None,
        "deterministic": deterministic or None,
        "safety": safety,
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    machine = {
        "device": device,
        "dtype": None if dtype is None else dtype.value,
        "safety_checker": safety_checker,
        "lora_dir": lora_dir,
        "embedding_dir": embedding_dir,
    }

    from safelight.batch import rows, runner
    from safelight.batch.window import Saving

    for name, value in rows.assignments(more or ()).items():
        if name in fields:
            raise InvalidRequest(name, "is given twice.", "Give it once.")
        fields[name] = value
    saving = Saving(_FORMATS[picture_format], metadata)
    options = runner.Options(
        file=file,
        folder=output,
        fields=fields,
        model=fast_options.model_for(model, fast),
        seed=seed,
        same_seed=same_seed,
        ignore=ignore,
        saving=saving,
        lasting={name: machine[name] for name in ("device", "dtype", "safety_checker")},
        restart=restart and not dry_run,
        again=retry_failed and not dry_run,
        page=page,
        csv=as_csv,
    )
    if dry_run:
        _check(runner.checked(options), as_json=as_json)
        return
    run = runner.Run(options)
    given = {name: value for name, value in machine.items() if value is not None}
    telling = _Telling(run, quiet=quiet or as_json)
    if deterministic:
        from safelight.cli.generate import steady

        steady()
    if engine == "ray":
        from safelight.batch.onray import OnRay

        maker: Maker = OnRay(
            given,
            saving,
            live=live,
            workers=workers,
            cpus=worker_cpus,
            address=ray_address,
            steady=deterministic,
        )
    else:
        maker = runner.Local(given, saving, live=live, heard=telling.loaded)
    with _stopping() as cancel, telling:
        summary = run.finish(maker, cancel, telling.hear)
    _leave(summary, as_json=as_json, quiet=quiet)


@contextmanager
def _stopping() -> Iterator[Cancel]:
    """The first Ctrl-C or SIGTERM ends the run within a step; the second ends the process."""
    from safelight.generate import Cancel

    cancel = Cancel()

    def stop(number: int, frame: Any) -> None:
        if cancel.is_set:
            raise KeyboardInterrupt
        cancel.set()

    if threading.current_thread() is not threading.main_thread():
        yield cancel
        return
    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield cancel
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class _Telling:
    """The bar, or a line now and then where nobody watches."""

    def __init__(self, run: Run, *, quiet: bool) -> None:
        self._run, self._quiet = run, quiet
        self._say = show.words()
        self._say.quiet = quiet
        logging.getLogger("safelight.licence").disabled = quiet
        self._bar = show.bar(quiet=quiet, extra="{task.fields[speed]}")
        self._task = self._bar.add_task("rows", total=run.table.rows, speed="")
        self._bar.update(self._task, completed=run.before)
        self._began = self._last = time.monotonic()
        self._rows, self._pictures = run.before, 0

    def __enter__(self) -> _Telling:
        if self._run.before:
            line = f"{self._run.before} of {self._run.table.rows} rows are done already"
            self._say.print(line, style="dim")
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def loaded(self, generator: Generator) -> None:
        """What the model has to say, and where the clock begins."""
        for note in generator.model.notes:
            self._say.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
        if not self._pictures:
            self._began = time.monotonic()
            self._bar.reset(self._task, completed=self._rows, total=self._run.table.rows)

    def hear(self, record: Mapping[str, Any]) -> None:
        """A row has ended. Called on another thread."""
        self._rows += 1
        self._pictures += len(record["files"])
        now = time.monotonic()
        speed = f"{self._pictures / max(now - self._began, 1e-6):.1f} pictures/s"
        self._bar.update(self._task, completed=self._rows, speed=speed)
        if self._say.is_terminal or now - self._last < _EVERY:
            return
        self._last = now
        total, here = self._run.table.rows, self._rows - self._run.before
        left = (now - self._began) / max(here, 1) * (total - self._rows)
        self._say.print(f"{self._rows} of {total} rows, {speed}, {left:.0f} s left")


def _check(wishes: Iterator[Any], *, as_json: bool) -> None:
    """``--dry-run``: the rows that are wrong."""
    total, bad = 0, []
    for wish in wishes:
        total += 1
        if wish.error is not None:
            bad.append({"row": wish.row, "line": wish.line, "error": wish.error})
    if as_json:
        show.document({"schema": 1, "rows": total, "wrong": bad})
    else:
        for each in bad:
            typer.echo(f"row {each['row']}, {each['line']}: {_words(each['error'])}")
        typer.echo(f"{total - len(bad)} of {total} rows are right.")
    if bad:
        raise SafelightError(f"{len(bad)} of {total} rows are wrong.")


def _words(error: Mapping[str, str]) -> str:
    head = f"{error['field']}: " if error["field"] else ""
    return f"{head}{error['problem']} {error['fix']}".strip()


def _leave(summary: Summary, *, as_json: bool, quiet: bool) -> None:
    """What was made, where it is, and the exit code."""
    from safelight.batch import ledger

    manifest = summary.folder / ledger.MANIFEST
    now = f", {summary.made} of them now, in {summary.seconds:.1f} s" if summary.made else ""
    if as_json:
        document = {
            "schema": 1,
            "manifest": manifest,
            "page": summary.page,
            "seed": summary.seed,
            "rows": summary.total,
            "finished": summary.finished,
            "statuses": dict(summary.statuses),
            "pictures": summary.pictures,
            "missing": summary.missing,
            "cancelled": summary.cancelled,
            "this_run": {
                "rows_before": summary.before,
                "pictures": summary.made,
                "seconds": round(summary.seconds, 3),
            },
        }
        show.document(document)
    else:
        say = show.words()
        say.quiet = quiet
        counts = ", ".join(f"{n} {status}" for status, n in sorted(summary.statuses.items()))
        say.print(
            f"{summary.finished} of {summary.total} rows ({counts or 'none yet'}), "
            f"{summary.pictures} pictures{now}; seed {summary.seed}",
            soft_wrap=True,
        )
        for record in _failures(summary):
            error = record["error"] or {"field": "", "problem": "", "fix": ""}
            line = f"row {record['row']}, {record['line']}: {_words(error)}"
            say.print(Text(line, style="red"), soft_wrap=True)
        if summary.missing:
            line = f"{summary.missing} files that the manifest names are gone; --restart."
            say.print(line, style="yellow")
        if summary.page is not None:
            say.print(f"look at {summary.page}", soft_wrap=True, markup=False)
        typer.echo(manifest)
    if summary.cancelled:
        left = summary.total - summary.finished
        raise Cancelled(f"stopped with {left} rows to go: run the same command again to go on.")
    if summary.failed:
        raise SafelightError(
            f"{summary.failed} of {summary.total} rows failed; {manifest} says why."
        )


def _failures(summary: Summary) -> list[dict[str, Any]]:
    from safelight.batch import ledger

    if not summary.failed:
        return []
    failed = (r for r in ledger.records(summary.folder) if r["status"] in ledger.FAILED)
    return [record for record, _ in zip(failed, range(_SHOWN), strict=False)]
