"""The story of a run: look through the file, take up what is done, make the rest, keep it."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from safelight.batch import ledger, page, rows
from safelight.batch.keeper import Keeper
from safelight.batch.ledger import Ledger, Record
from safelight.batch.rows import Defaults, Wish
from safelight.batch.table import open_table
from safelight.batch.window import Made, Saving, Task, Window
from safelight.errors import InvalidRequest, ModelNotFound, SafelightError, WeightsError
from safelight.generate import Cancel, Generator, load
from safelight.inputs import PictureInput

log = logging.getLogger(__name__)

Waiting = dict[int, tuple[Wish, set[int | None]]]
"""Rows that are being made, each with the pictures that it lacks."""


class Maker(Protocol):
    """What makes rows: this machine (:class:`Local`), or many (:mod:`safelight.batch.onray`)."""

    def make(self, model: str, tasks: Iterable[Task], cancel: Cancel) -> Iterator[Made]:
        """Pictures in any order. Errors that are of one row are told, not raised."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class Local:
    """Makes rows on this machine, one model at a time.

    Args:
        machine: options of :func:`safelight.generate.load`.
        heard: called with each model when it is loaded.
    """

    def __init__(
        self,
        machine: Mapping[str, Any] | None = None,
        saving: Saving | None = None,
        *,
        live: int | None = None,
        loader: Callable[..., Generator] | None = None,
        heard: Callable[[Generator], None] | None = None,
    ) -> None:
        self._machine, self._saving, self._live = machine or {}, saving, live
        self._load, self._heard = loader or load, heard

    def make(self, model: str, tasks: Iterable[Task], cancel: Cancel) -> Iterator[Made]:
        """See :class:`Maker`."""
        generator = self._load(model, **self._machine)
        if self._heard is not None:
            self._heard(generator)
        return Window(generator, self._saving, live=self._live).make(tasks, cancel)

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class Options:
    """How a file is run.

    Args:
        seed: of the run; None draws one, or takes up the one that the folder was begun with.
        lasting: what else decides the pictures, by name; it may not change from one run of a
            folder to the next.
        restart: forget what the folder holds of an earlier run.
        again: try rows that failed once more.
    """

    file: Path
    folder: Path
    fields: Mapping[str, Any] = field(default_factory=dict)
    model: str = "tiny"
    seed: int | None = None
    same_seed: bool = False
    ignore: bool = False
    saving: Saving = field(default_factory=Saving)
    lasting: Mapping[str, Any] = field(default_factory=dict)
    restart: bool = False
    again: bool = False
    page: bool = True
    csv: bool = False


@dataclass
class Summary:
    """What a folder holds when a run ends.

    Args:
        total: rows of the file.
        statuses: finished rows by status.
        pictures: files that the manifest names.
        before: rows that were finished before this run.
        made: pictures of this run.
        seconds: of this run.
        missing: files that the manifest names and that are gone.
        cancelled: it was stopped.
    """

    total: int
    seed: int
    folder: Path
    before: int = 0
    made: int = 0
    seconds: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    pictures: int = 0
    missing: int = 0
    cancelled: bool = False
    page: Path | None = None

    @property
    def finished(self) -> int:
        """Rows."""
        return sum(self.statuses.values())

    @property
    def failed(self) -> int:
        """Rows with a picture missing."""
        return self.statuses["failed"] + self.statuses["partial"]


class Run:
    """One run of a file into a folder. Everything is checked here; work begins with
    :meth:`finish`.

    Raises:
        InvalidRequest: the file, a column, a default or the folder is wrong, or the folder belongs
            to another file or other options.
        MissingExtra: Parquet without pyarrow.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.table = open_table(options.file)
        rows.check_columns(self.table, ignore=options.ignore)
        if not options.model.strip():
            raise InvalidRequest("model", "is empty.", "See safelight models.")
        self.defaults = Defaults(
            options.fields, options.model, 0, same_seed=options.same_seed, ignore=options.ignore
        )
        self.defaults.check()
        self.models = self._models()
        self._sources = options.file.resolve().parent
        self._lock = _opened(options.folder)
        try:
            seed = self._take_up()
            self.defaults = replace(self.defaults, seed=seed)
            self.book = Ledger.open(options.folder, again=options.again)
        except BaseException:
            self._lock.release()
            raise
        self.before = self.book.finished

    def _models(self) -> list[str]:
        """In the order in which they are first named."""
        default = self.options.model.strip()
        if not {"model", *rows._MODEL} & set(self.table.columns):
            return [default]
        return list(dict.fromkeys(rows.model_of(entry, default) for entry in self.table))

    # -- what run it is ----------------------------------------------------------------------

    def _take_up(self) -> int:
        """The run's seed. A folder that was begun otherwise is refused."""
        folder = self.options.folder
        if self.options.restart:
            ledger.clear(folder)
        state = ledger.read_state(folder)
        if state is None:
            seed = self.options.seed
            seed = secrets.randbelow(2**32) if seed is None else seed
            self.state = {"input": self._input(), "seed": seed, "options": self._lasting()}
            ledger.write_state(folder, {**self.state, "models": {}})
            self.state["models"] = {}
            return seed
        changed = _changed(state, self._input(), self._lasting(), self.options.seed)
        if changed:
            raise InvalidRequest(
                "output",
                f"{folder} was begun otherwise: {'; '.join(changed)}.",
                "Use another folder, or start over with --restart.",
            )
        self.state = state
        return int(state["seed"])

    def _input(self) -> Record:
        table = self.table
        return {"file": table.path.name, "sha256": table.digest, "rows": table.rows}

    def _lasting(self) -> Record:
        """Everything that decides the pictures, as JSON keeps it."""
        o = self.options
        found = {
            **{name: _jsonable(value) for name, value in o.fields.items()},
            "model": o.model,
            "same_seed": o.same_seed,
            "ignore_columns": o.ignore,
            "format": o.saving.format,
            "metadata": o.saving.metadata,
            **{name: _jsonable(value) for name, value in o.lasting.items()},
        }
        return {name: value for name, value in found.items() if value is not None}

    def _same_weights(self, model: str, digest: str | None) -> None:
        """Refuse weights that are not those that the run was begun with."""
        known = self.state["models"].get(model)
        if known is None and digest:
            self.state["models"][model] = digest
            ledger.write_state(self.options.folder, self.state)
        elif digest and known != digest:
            raise SafelightError(
                f"{model}: its weights have changed since this folder was begun. "
                "Use another folder, or start over with --restart."
            )

    # -- work --------------------------------------------------------------------------------

    def finish(
        self,
        maker: Maker,
        cancel: Cancel | None = None,
        heard: Callable[[Record], None] | None = None,
    ) -> Summary:
        """Make what is not made.

        Args:
            heard: called with the record of every row that ends, on another thread.

        Raises:
            ledger.DiskFull: no room; run it again when there is.
            SafelightError: the model cannot be loaded, or other weights answer to its name.
        """
        cancel, began = cancel or Cancel(), time.monotonic()
        summary = Summary(self.table.rows, self.defaults.seed, self.options.folder, self.before)

        def hear(record: Record) -> None:
            summary.made += len(record["files"])
            if heard is not None:
                heard(record)

        keeper = Keeper(self.book, self.options.folder, self.options.saving.format, hear)
        try:
            try:
                for model in self.models:
                    self._make(model, maker, keeper, cancel)
            finally:
                maker.close()
                keeper.close()
        finally:
            summary.seconds = time.monotonic() - began
            done = self.book.next > self.table.rows
            self.book.close(finished=done)
            self._lock.release()
        summary.cancelled = cancel.is_set and not done
        self._tell(summary)
        return summary

    def _make(self, model: str, maker: Maker, keeper: Keeper, cancel: Cancel) -> None:
        """All rows of one model."""
        waiting: Waiting = {}
        tasks = self._tasks(model, keeper, waiting, cancel)
        first = next(tasks, None)  # a model without rows to make is not loaded
        if first is None:
            return
        everything = itertools.chain([first], tasks)
        try:
            pictures = maker.make(model, everything, cancel)
        except (ModelNotFound, WeightsError, InvalidRequest) as error:
            if model == self.options.model.strip():
                raise
            problem = {"field": "model", "problem": str(error), "fix": ""}
            for task in everything:
                wish, _ = waiting.pop(task.row)
                keeper.keep(replace(wish, error=problem), None)
            return
        for made in pictures:
            if made.row not in waiting:  # told twice, by machines that fail
                continue
            self._same_weights(model, made.model)
            wish, left = waiting[made.row]
            if made.index is None or made.index in left:
                keeper.keep(wish, made)
            left.discard(made.index)
            if made.index is None or not left:
                del waiting[made.row]

    def _tasks(
        self, model: str, keeper: Keeper, waiting: Waiting, cancel: Cancel
    ) -> Iterator[Task]:
        """The rows of a model that are not done, those that are wrong set aside at once."""
        for entry in self.table:
            if cancel.is_set:
                return
            if self.book.done(entry.row):
                continue
            if len(self.models) > 1 and rows.model_of(entry, self.options.model.strip()) != model:
                continue
            wish = rows.wish(entry, self.defaults, self._sources)
            if wish.request is None:
                keeper.keep(wish, None)
                continue
            have = frozenset(self.book.partial.get(entry.row, ()))
            light = replace(wish, request=_without_pictures(wish.request))
            left: set[int | None] = set(range(wish.request.count))
            waiting[entry.row] = light, left - have
            yield Task(entry.row, wish.request, have)

    def _tell(self, summary: Summary) -> None:
        """Count what the folder holds, and write its page."""
        o = self.options
        made = page.Page(o.folder, title=o.file.name) if o.page else None
        sheet = page.Sheet(o.folder) if o.csv else None
        for record in itertools.chain(ledger.records(o.folder), ledger.waiting(o.folder)):
            summary.statuses[record["status"]] += 1
            summary.pictures += len(record["files"])
            summary.missing += sum(not (o.folder / name).exists() for name in record["files"])
            for each in (made, sheet):
                if each is not None:
                    each.add(record)
        if made is not None:
            summary.page = made.close()
        if sheet is not None:
            sheet.close()


def checked(options: Options) -> Iterator[Wish]:
    """Every row as it is understood. Nothing is made, and no folder."""
    table = open_table(options.file)
    rows.check_columns(table, ignore=options.ignore)
    defaults = Defaults(
        options.fields, options.model, options.seed or 0, options.same_seed, options.ignore
    )
    defaults.check()
    folder = options.file.resolve().parent
    return (rows.wish(entry, defaults, folder) for entry in table)


def _opened(folder: Path) -> ledger.Lock:
    """A folder that can be written to, and nobody else's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".batch.probe"
        probe.write_bytes(b"")
        probe.unlink()
        return ledger.Lock(folder)
    except FileExistsError:
        raise InvalidRequest("output", f"{folder} is a file, not a folder.") from None
    except NotADirectoryError:
        raise InvalidRequest("output", f"{folder} lies in a file.") from None
    except OSError as error:
        raise InvalidRequest("output", f"{folder} cannot be written: {error.strerror}.") from None


def _changed(state: Record, given: Record, lasting: Record, seed: int | None) -> list[str]:
    """How a run differs from the one that a folder was begun with, for people."""
    found = []
    if state["input"]["sha256"] != given["sha256"]:
        was = state["input"]
        same = was["file"] == given["file"]
        found.append(f"{given['file']} has changed" if same else f"its file was {was['file']}")
    if seed is not None and seed != state["seed"]:
        found.append(f"seed was {state['seed']}, now {seed}")
    old = state["options"]
    for name in sorted({*old, *lasting}):
        was, now = old.get(name, "not given"), lasting.get(name, "not given")
        if was != now:
            found.append(f"{name} was {was}, now {now}")
    return found


def _jsonable(value: Any) -> Any:
    if isinstance(value, PictureInput):
        return value.digest
    if isinstance(value, Mapping):
        return {str(name): _jsonable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _without_pictures(request: Any) -> Any:
    """A request to remember while it waits: its pictures by their digests alone."""
    changes: dict[str, Any] = {
        name: PictureInput(None, getattr(request, name).digest)
        for name in ("image", "mask", "depth")
        if getattr(request, name) is not None
    }
    if request.images:
        changes["images"] = [PictureInput(None, each.digest) for each in request.images]
    return request.replace(**changes) if changes else request
