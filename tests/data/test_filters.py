"""``safelight data filter``: rules, reports, LAION's many column names, bad rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.cli.main import main
from safelight.data.filters import FILTERS, Filter, FilterReport, named, run_filter
from safelight.errors import InvalidRequest

# Column names as the published files have them.
LAYOUTS: dict[str, dict[str, str]] = {
    "improved_aesthetics_6plus": {},
    "laion-art": {"AESTHETIC_SCORE": "aesthetic"},
    "relaion": {"URL": "url", "TEXT": "caption", "WIDTH": "width", "HEIGHT": "height",
                "LANGUAGE": "language"},
    "img2dataset": {"URL": "url", "TEXT": "caption", "WIDTH": "original_width",
                    "HEIGHT": "original_height"},
}  # fmt: skip


def table(count: int = 400, seed: int = 0) -> dict[str, list[Any]]:
    rng = np.random.default_rng(seed)
    sides = np.array([256, 511, 512, 768, 1023, 1024, 2048, 2049])
    return {
        "URL": [f"http://a.example/{i}.jpg" for i in range(count)],
        "TEXT": [f"picture {i}" for i in range(count)],
        "WIDTH": rng.choice(sides, count).astype(float).tolist(),
        "HEIGHT": rng.choice(sides, count).astype(float).tolist(),
        "similarity": rng.uniform(0.2, 0.4, count).tolist(),
        "punsafe": rng.choice([0.0, 0.05, 0.1, 0.3, 0.9], count).tolist(),
        "pwatermark": rng.choice([0.1, 0.5, 0.7, 0.8], count).tolist(),
        "AESTHETIC_SCORE": rng.choice([4.0, 4.5, 5.0, 5.01, 6.0, 7.0, 8.5], count).tolist(),
        "LANGUAGE": rng.choice(["en", "de", "ja"], count).tolist(),
        "hash": rng.integers(-(2**62), 2**62, count).tolist(),
    }


def write(path: Path, columns: dict[str, list[Any]], layout: str = "improved_aesthetics_6plus"):
    names = LAYOUTS[layout]
    renamed = {names.get(k, k): v for k, v in columns.items()}
    if layout == "img2dataset":  # the stored pictures are all of one size
        renamed["width"] = renamed["height"] = [256] * len(columns["URL"])
    pq.write_table(pa.table(renamed), path, row_group_size=100)
    return path


def urls(path: Path) -> list[str]:
    return pq.read_table(path).column("URL").to_pylist()


# The queries written once more, in another engine's language.
EXPRESSIONS = {
    "laion-high-resolution": (pc.field("WIDTH") >= 1024) & (pc.field("HEIGHT") >= 1024),
    "laion-improved-aesthetics": (pc.field("WIDTH") >= 512)
    & (pc.field("HEIGHT") >= 512)
    & (pc.field("AESTHETIC_SCORE") > 5.0)
    & (pc.field("pwatermark") < 0.5),
    "laion-aesthetics-v2-5plus": pc.field("AESTHETIC_SCORE") >= 5.0,
    "improved-aesthetics-6plus": pc.field("AESTHETIC_SCORE") >= 6.0,
    "laion2b-en-aesthetic": (pc.field("AESTHETIC_SCORE") > 7.0)
    & (pc.field("pwatermark") < 0.8)
    & (pc.field("punsafe") < 0.5),
    "laion-art": (pc.field("AESTHETIC_SCORE") > 8.0)
    & (pc.field("pwatermark") < 0.8)
    & (pc.field("punsafe") < 0.5),
    "laion-hd": (pc.field("WIDTH") >= 1024) & (pc.field("HEIGHT") >= 1024),
    "sd-v2-256": (pc.field("punsafe") < 0.1) & (pc.field("AESTHETIC_SCORE") >= 4.5),
    "sd-v2-512": (pc.field("punsafe") < 0.1)
    & (pc.field("AESTHETIC_SCORE") >= 4.5)
    & (pc.field("WIDTH") >= 512)
    & (pc.field("HEIGHT") >= 512),
    "sd-v2-768": (pc.field("punsafe") < 0.1)
    & (pc.field("AESTHETIC_SCORE") >= 4.5)
    & (pc.field("WIDTH") >= 768)
    & (pc.field("HEIGHT") >= 768),
    "sd-x4": (pc.field("WIDTH") > 2048) & (pc.field("HEIGHT") > 2048),
}


def test_every_named_filter_has_its_query() -> None:
    assert EXPRESSIONS.keys() == FILTERS.keys()


@pytest.mark.parametrize("name", EXPRESSIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_named_filters_keep_what_arrow_itself_selects(
    tmp_path: Path, name: str, layout: str
) -> None:
    columns = table()
    source = write(tmp_path / "part.parquet", columns, layout)
    expected = pa.table(columns).filter(EXPRESSIONS[name]).column("URL").to_pylist()
    assert 0 < len(expected) < 400
    report = run_filter([source], named(name), tmp_path / "kept.parquet")
    assert urls(tmp_path / "kept.parquet") == expected
    assert report.kept == len(expected)
    assert report.rows == 400


def test_the_report_adds_up_and_the_rejected_carry_their_rule(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet", table())
    spec = named("laion-improved-aesthetics")
    out, rest = tmp_path / "kept.parquet", tmp_path / "rest.jsonl"
    report = run_filter([source], spec, out, rejected=rest)
    assert report.rows - report.kept == sum(rule.removed for rule in report.rules)
    lines = [json.loads(line) for line in rest.read_text().splitlines()]
    for rule in report.rules:
        assert sum(line["rule"] == rule.name for line in lines) == rule.removed
    alone = {r.name: r.failing for r in report.rules}
    whole = pa.table(table())
    assert alone["watermark"] == whole.filter(pc.field("pwatermark") >= 0.5).num_rows
    assert alone["aesthetic"] == whole.filter(pc.field("AESTHETIC_SCORE") <= 5).num_rows
    assert sorted(urls(out) + [line["URL"] for line in lines]) == sorted(table()["URL"])
    # What passes is passed on untouched, 64-bit hashes included.
    kept = pq.read_table(out)
    wanted = whole.filter(pc.is_in(whole["URL"], kept["URL"])).column("hash")
    assert kept.column("hash").to_pylist() == wanted.to_pylist()


def test_files_of_many_kinds_and_names_are_one_table(tmp_path: Path) -> None:
    columns = table(30)
    write(tmp_path / "a.parquet", columns)
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    with (tmp_path / "b.jsonl").open("w") as file:
        for row in rows:
            names = {LAYOUTS["relaion"].get(k, k): v for k, v in row.items()}
            file.write(json.dumps(names | {"url": row["URL"] + "?b"}) + "\n")
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(row | {"URL": row["URL"] + "?c"} for row in rows)
    report = run_filter([tmp_path], Filter(min_side=512), tmp_path / "list.csv")
    assert len(report.files) == 3
    with (tmp_path / "list.csv").open(newline="") as file:
        kept = [row["URL"] for row in csv.DictReader(file)]
    expected = [r["URL"] for r in rows if min(r["WIDTH"], r["HEIGHT"]) >= 512]
    assert kept == [u + end for end in ("", "?b", "?c") for u in expected]


def test_rows_and_files_that_cannot_be_read_are_listed_not_fatal(tmp_path: Path) -> None:
    good = {"url": "http://a.example/1.jpg", "caption": "one", "width": 600, "height": 600}
    lines = [
        json.dumps(good),
        '{"url": "http://a.example/2.jpg", "caption": "cut',
        "[1, 2]",
        json.dumps(good | {"caption": "  "}),
        json.dumps(good | {"width": None}),
        json.dumps(good | {"width": "many"}),
        json.dumps(good | {"url": ""}),
        json.dumps(good | {"width": "700"}),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "c.csv").write_text("url,caption,width,height\nx,y\nhttp://c,c,800,800\n")
    report = run_filter([tmp_path], Filter(min_side=512), tmp_path / "kept" / "list.txt")
    assert (tmp_path / "kept" / "list.txt").read_text().split() == [good["url"]] * 2 + ["http://c"]
    wheres = [Path(entry["where"]).name for entry in report.bad_listed]
    assert sorted(wheres) == ["a.jsonl:2", "a.jsonl:3", "b.parquet", "c.csv:2"]
    assert report.bad == 4
    assert {r.name: r.removed for r in report.rules} == {"url": 1, "caption": 1, "size": 2}
    assert {r.name: r.missing for r in report.rules}["size"] == 2


def test_a_parquet_file_that_breaks_off_keeps_what_came_before(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", table(2000))
    data = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(10)
    start = group.column(0).data_page_offset
    data[start : start + 64] = b"\xff" * 64
    path.write_bytes(bytes(data))
    report = run_filter([path], Filter(min_side=1), tmp_path / "kept.parquet")
    assert report.bad == 1
    assert 0 <= report.rows < 2000


def test_missing_values(tmp_path: Path) -> None:
    columns = table(50)
    columns["pwatermark"][:20] = [None] * 20
    source = write(tmp_path / "a.parquet", columns)
    spec = Filter(watermark_below=0.75)
    dropped = run_filter([source], spec)
    kept = run_filter([source], spec.replace(missing="keep"))
    assert kept.kept - dropped.kept == 20
    assert dropped.output is None
    columns.pop("punsafe")
    source = write(tmp_path / "b.parquet", columns)
    with pytest.raises(InvalidRequest, match="punsafe: no table has a column punsafe"):
        run_filter([source], named("sd-v2-256"))


def test_the_two_aesthetic_predictors_are_not_mixed_silently(tmp_path: Path) -> None:
    columns = table(20)
    columns["aesthetic"] = [9.0] * 20
    columns["AESTHETIC_SCORE"] = [1.0] * 20
    both = write(tmp_path / "a.parquet", columns)
    assert run_filter([both], Filter(aesthetic_min=5, predictor="v1")).kept == 20
    assert run_filter([both], Filter(aesthetic_min=5, predictor="v2")).kept == 0
    assert run_filter([both], Filter(aesthetic_min=5, predictor="v2")).notes == ()
    columns.pop("AESTHETIC_SCORE")
    first = write(tmp_path / "b.parquet", columns)
    assert "predictor v2" in run_filter([first], Filter(aesthetic_min=5, predictor="v2")).notes[0]


@settings(max_examples=20)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=20), st.integers(1, 3000))
def test_a_stricter_size_keeps_no_more(sides: Sequence[int], limit: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        text = "\n".join(f"u{i},t,{s},{s}" for i, s in enumerate(sides))
        path.write_text(f"url,text,width,height\n{text}\n")
        assert run_filter([path], Filter(min_side=limit)).kept == sum(s >= limit for s in sides)


def test_nothing_is_left_behind_when_a_run_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.parquet", table(20))

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_filter([source], Filter(min_side=1), tmp_path / "kept.parquet", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]
    with pytest.raises(InvalidRequest, match="also an input"):
        run_filter([source], Filter(min_side=1), source)
    with pytest.raises(InvalidRequest, match="cannot write"):
        run_filter([source], Filter(min_side=1), tmp_path / "k.parquet", rejected="x.xls")
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


# -- the command ------------------------------------------------------------------------------


def data(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(["data", *map(str, arguments)])
    return int(leaving.value.code or 0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.parquet", table())
    out, saved = tmp_path / "list.parquet", tmp_path / "report.json"
    arguments = ["filter", source, "-o", out, "-p", "laion-improved-aesthetics", "--report", saved]
    assert data(*arguments, "--language", "en") == 0
    text = capsys.readouterr().out
    assert "img2dataset --url_list" in text
    report = FilterReport.model_validate_json(saved.read_text())
    assert report.filter == named("laion-improved-aesthetics").replace(languages=("en",))
    assert f"{report.kept} of 400 rows kept" in text
    assert set(pq.read_table(out).column("LANGUAGE").to_pylist()) == {"en"}
    assert data(*arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kept"] >= report.kept


def test_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.parquet", table(5))
    for arguments, message in (
        ([source], "preset: no rule is given"),
        ([source, "-p", "laion-best"], "preset: no filter 'laion-best'"),
        ([source, "--min-side", "0"], "min-side:"),
        ([tmp_path / "none.parquet", "--min-side", "1"], "tables: no file"),
        ([source, "--missing", "maybe", "--min-side", "1"], "missing:"),
    ):
        assert data("filter", *arguments) == 2
        assert message in capsys.readouterr().err
    assert data("filters") == 0
    assert "laion-art" in capsys.readouterr().out
