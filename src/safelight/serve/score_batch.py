"""AzureML's batch entry: ``init()`` once a process, then ``run(mini_batch)``.

A mini-batch is a list of files: tables (CSV) with a ``prompt`` a row, or pictures for a model that
looks at pictures. Pictures go to ``AZUREML_BI_OUTPUT_PATH``, and what ``run`` returns becomes the
rows of ``predictions.csv`` (``output_action: append_row``). Here on one machine:

    python -m safelight.serve.score_batch prompts/ -o out/
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safelight import provenance
from safelight.errors import InvalidRequest, SafelightError
from safelight.generate import Generator
from safelight.request import GenerateRequest, ImageResult
from safelight.safety import BATCH
from safelight.serve import scoring, wire
from safelight.store import pictures

COLUMNS = ("prompt", "generated_image", "nsfw_content_detected", "_azureml_filename")
"""Of ``predictions.csv``."""
BLOCKED = "Blocked By Azure AI Content Safety"
"""Stands in ``generated_image`` where content safety removed the picture or its prompt."""
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tiff")
_IGNORED = ("index", "", "Unnamed: 0")
_AT_ONCE = 8
_SPACE = uuid.UUID("6e6f6973-6520-746f-2070-696374757265")
_held: list[Generator] = []


def init() -> None:
    """Load the model that the environment names; see :func:`scoring.from_azure`."""
    _held[:] = [scoring.from_azure(BATCH)]


def run(mini_batch: Sequence[str | Path]) -> Any:
    """Make the pictures of some files.

    All files are read before the first picture is made. A mini-batch that is tried again writes
    over what it wrote.

    Returns:
        a data frame with :data:`COLUMNS` where pandas is installed, as on AzureML; else rows.

    Raises:
        InvalidRequest: a file or a row is wrong; names both. AzureML counts the mini-batch as
            failed (``error_threshold``).
        SafelightError: a picture could not be made.
    """
    if not _held:
        raise SafelightError("init() comes first.")
    output = Path(os.environ.get("AZUREML_BI_OUTPUT_PATH") or ".")
    work = [each for file in mini_batch for each in read(Path(file))]
    rows = []
    for start in range(0, len(work), _AT_ONCE):
        part = work[start : start + _AT_ONCE]
        results = _held[0].generate(request=[request for request, _, _ in part])
        rows += [_row(output, asked, result) for asked, result in zip(part, results, strict=True)]
    try:
        import pandas
    except ModuleNotFoundError:
        return rows
    return pandas.DataFrame(rows, columns=list(COLUMNS))


def _row(
    output: Path, asked: tuple[GenerateRequest, str, str], result: ImageResult
) -> tuple[str, str, bool, str]:
    request, name, file = asked
    if scoring.missing(result):
        (output / name).unlink(missing_ok=True)
        shown = BLOCKED if any(m.removed for m in result.moderation) else ""
    else:
        output.mkdir(parents=True, exist_ok=True)
        pictures.write(output / name, provenance.encode(result, "JPEG"))
        shown = name
    return request.prompt, shown, scoring.detected(result), file


# -- what is read ---------------------------------------------------------------------------------


def read(file: Path) -> list[tuple[GenerateRequest, str, str]]:
    """A file's requests, each with the name of its picture and of the file.

    Raises:
        InvalidRequest: the file, or a row of it, is wrong.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InvalidRequest(str(file), f"cannot be read: {error.strerror}.") from None
    if file.suffix.lower() == ".csv":
        requests = list(_table(file, data))
    elif file.suffix.lower() in _PICTURES:
        requests = [GenerateRequest(image=data)]  # a model that wants a prompt will say so
    else:
        fix = f"Mini-batches are of .csv and pictures ({' '.join(_PICTURES)})."
        raise InvalidRequest(str(file), "is no file that is scored here.", fix)
    digest = hashlib.sha256(data).hexdigest()
    names = [
        f"image_{uuid.uuid5(_SPACE, f'{file.name}:{digest}:{place}')}.jpeg"
        for place in range(len(requests))
    ]
    return [(request, name, file.name) for request, name in zip(requests, names, strict=True)]


def _table(file: Path, data: bytes) -> Iterator[GenerateRequest]:
    """Columns: ``prompt``; ``image`` (a file beside it, or base64); the card's parameters."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidRequest(str(file), "is not UTF-8.") from None
    table = csv.DictReader(io.StringIO(text, newline=""))
    columns = [name for name in table.fieldnames or () if name not in _IGNORED]
    if "prompt" not in columns:
        raise InvalidRequest(str(file), "has no column prompt.", "Its first line names it.")
    for name in columns:
        if name not in ("prompt", "image", *scoring.PARAMETERS):
            raise InvalidRequest(str(file), f"has a column {name}, which is not supported.")
    for line, row in enumerate(table, start=2):
        yield _asked(file, line, row)


def _asked(file: Path, line: int, row: Mapping[str, Any]) -> GenerateRequest:
    where = f"{file.name}, row {line}"
    prompt = row.get("prompt") or ""
    given = {name: row[name] for name in scoring.PARAMETERS if row.get(name)}
    more: dict[str, Any] = {}
    if None in row:
        raise InvalidRequest(where, "has more cells than the first line has names.")
    if row.get("image"):
        more["image"] = _picture(file, row["image"], where)
    if not prompt.strip() and not more:
        raise InvalidRequest(where, "must hold a prompt.")
    for name, value in given.items():
        try:
            given[name] = float(value) if name == "guidance_scale" else int(value)
        except ValueError:
            raise InvalidRequest(where, f"{name} is not a number: {value!r}.") from None
    try:
        return scoring.asked(where, prompt, given, **more)
    except InvalidRequest as error:
        problem = error.problem if error.field == where else f"{error.field} {error.problem}"
        raise InvalidRequest(where, problem, error.fix) from None


def _picture(file: Path, value: str, where: str) -> bytes:
    """A picture of a row: a file in the table's folder and nowhere else, or base64."""
    if value.lower().endswith(_PICTURES):
        path = (file.parent / value).resolve()
        if not path.is_relative_to(file.parent.resolve()) or not path.is_file():
            raise InvalidRequest(where, f"there is no picture {value} beside the table.")
        return path.read_bytes()
    try:
        return wire.picture(value, "image")
    except InvalidRequest as error:
        raise InvalidRequest(where, f"image {error.problem}", error.fix) from None


# -- here on one machine --------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Score a folder as the endpoint does, one file a mini-batch."""
    parser = argparse.ArgumentParser("score_batch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("input", type=Path, help="a folder of tables or pictures, or one of them")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    endings = (".csv", *_PICTURES)
    files = [given.input]
    if given.input.is_dir():
        files = sorted(p for p in given.input.iterdir() if p.suffix.lower() in endings)
    if not files:
        raise InvalidRequest("input", f"{given.input} holds nothing to score.")
    os.environ["AZUREML_BI_OUTPUT_PATH"] = str(given.output)
    given.output.mkdir(parents=True, exist_ok=True)
    init()
    with (given.output / "predictions.csv").open("w", encoding="utf-8", newline="") as out:
        table = csv.writer(out)
        table.writerow(COLUMNS)
        for file in files:
            made = run([file])
            table.writerows(made if isinstance(made, list) else made.itertuples(index=False))
            out.flush()


if __name__ == "__main__":
    try:
        main()
    except SafelightError as error:
        sys.exit(f"error: {error}")
