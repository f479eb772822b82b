"""Files of requests: every kind gives the same rows, and a bad row is a row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from safelight.batch.table import Entry, open_table, plain, read_line
from safelight.errors import InvalidRequest, MissingExtra

ROWS: list[dict[str, Any]] = [
    {"prompt": "a red cube, shiny", "steps": 4, "guidance_scale": 2.5},
    {"prompt": 'a "blue" sphere\non two lines', "seed": 7},
    {"prompt": "ein grüner Kegel", "steps": 6, "seed": 2**40},
]
NAMES = ("prompt", "steps", "guidance_scale", "seed")


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """The rows as a file of the path's kind."""
    if path.suffix == ".parquet":
        columns = {name: [row.get(name) for row in rows] for name in NAMES}
        pq.write_table(pa.table(columns), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, NAMES, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return path


def fields(entries: list[Entry]) -> list[dict[str, Any]]:
    assert [entry.row for entry in entries] == list(range(1, len(entries) + 1))
    return [dict(entry.fields) for entry in entries]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    table = open_table(write(tmp_path / f"rows{ending}"))
    assert table.rows == 3
    assert set(table.columns) == set(NAMES)
    typed = ending not in (".csv", ".tsv")
    assert fields(list(table)) == [
        {name: value if typed else str(value) for name, value in row.items()} for row in ROWS
    ]


def test_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('# my prompts\n\na dog\'s red cube\n  --prompt "a --big cone" --steps 20\n')
    table = open_table(path)
    assert [(e.line, dict(e.fields)) for e in table] == [
        ("line 3", {"prompt": "a dog's red cube"}),
        ("line 4", {"prompt": "a --big cone", "steps": "20"}),
    ]
    assert set(table.columns) == {"prompt", "steps"}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("a cube -- red", {"prompt": "a cube -- red"}),
        ("a cube --n blurred, dark --w 512 --d 7 --s 20 --l 7.5", {
            "prompt": "a cube", "negative_prompt": "blurred, dark", "width": "512", "seed": "7",
            "steps": "20", "guidance_scale": "7.5"}),
        ("--prompt 'a cube' --negative_prompt bad hands --cfg_scale 3 --sd_model tiny", {
            "prompt": "a cube", "negative_prompt": "bad hands", "cfg_scale": "3",
            "sd_model": "tiny"}),
        ("a cube --seed -1", {"prompt": "a cube", "seed": "-1"}),
    ],
)  # fmt: skip
def test_lines_with_options(line: str, found: dict[str, str]) -> None:
    assert read_line(line) == found


@pytest.mark.parametrize("line", ["a cube --steps", "a cube --steps 4 --s 5"])
def test_a_line_that_makes_no_sense(tmp_path: Path, line: str) -> None:
    with pytest.raises(ValueError, match="--s"):
        read_line(line)
    (tmp_path / "p.txt").write_text(f"{line}\na sphere\n")
    bad, good = open_table(tmp_path / "p.txt")
    assert bad.problem.startswith("--s")
    assert good.fields == {"prompt": "a sphere"}


def test_spreadsheets(tmp_path: Path) -> None:
    """A byte-order mark, semicolons, capitals, trailing empty rows, UTF-16."""
    text = "Prompt;CFG scale\r\nein Würfel;2,5\r\n;\r\n"
    for encoding in ("utf-8-sig", "utf-16"):
        path = tmp_path / f"{encoding}.csv"
        path.write_bytes(text.encode(encoding))
        table = open_table(path)
        assert table.columns == {"prompt": "Prompt", "cfg_scale": "CFG scale"}
        assert fields(list(table)) == [{"Prompt": "ein Würfel", "CFG scale": "2,5"}]


@pytest.mark.parametrize(
    ("name", "data", "bad"),
    [
        ("a.csv", b"prompt,steps\na,1\nb\nc,2,3\nd,4\n", {2: "1 cells", 3: "3 cells"}),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n[1]\n"d"\n', {2: "not JSON", 3: "neither"}),
        ("b.jsonl", b'{"prompt": "a"}\n\xff\xfe\n{"prompt": "c"}\n"d"\n', {2: "not JSON"}),
        ("a.json", b'[{"prompt": "a"}, 3, {"prompt": "c"}, "d"]', {2: "neither"}),
    ],
)
def test_a_bad_row_is_a_row(tmp_path: Path, name: str, data: bytes, bad: dict[int, str]) -> None:
    (tmp_path / name).write_bytes(data)
    table = open_table(tmp_path / name)
    entries = list(table)
    assert len(entries) == table.rows == 4
    for entry in entries:
        if entry.row in bad:
            assert bad[entry.row] in entry.problem
        else:
            assert not entry.problem
            assert entry.fields["prompt"] in "acd"


def test_missing_numbers_are_left_out(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"], "steps": pa.array([float("nan")]), "seed": [None]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert fields(list(open_table(tmp_path / "a.parquet"))) == [{"prompt": "a"}]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("none.csv", None, "no file"),
        ("a.xlsx", b"PK", r"no known kind\. One of \.csv"),
        ("a.csv", b"prompt,steps\n", "holds no rows"),
        ("a.csv", b"", "no header"),
        ("a.csv", b"Prompt,prompt\na,b\n", "is there twice"),
        ("a.csv", b"prompt,,steps\na,b,c\n", "without a name"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b'{"prompt": "a"}', "not a list of rows"),
        ("a.parquet", b"PAR0", "no Parquet file"),
        ("a.txt", b"# nothing\n", "holds no rows"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, name: str, data: bytes | None, words: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidRequest, match=words):
        open_table(tmp_path / name)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra, match=r"safelight\[train\]"):
        open_table(path)


def test_plain_names() -> None:
    assert [plain(n) for n in (" Negative Prompt", "CFG-scale", "steps")] == [
        *("negative_prompt", "cfg_scale", "steps")
    ]
