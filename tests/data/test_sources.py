"""Folders, shards and datasets: the same pictures and captions whatever they lie in."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from picture_sets import (
    SET,
    hub_parquet,
    metadata_folder,
    picture,
    png,
    saved_dataset,
    shard,
    shard_folder,
    sidecar_folder,
)
from PIL import Image

from safelight.data.shards import Shards, expand
from safelight.data.sources import BadSample, Folder, StillLife, open_source, without
from safelight.errors import InvalidRequest

LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "sidecars": sidecar_folder,
    "metadata.jsonl": lambda root: metadata_folder(root, "jsonl"),
    "metadata.csv": lambda root: metadata_folder(root, "csv"),
    "metadata.parquet": lambda root: metadata_folder(root, "parquet"),
    "shards": shard_folder,
    "hub parquet": hub_parquet,
    "save_to_disk": saved_dataset,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_samples(tmp_path: Path, layout: str) -> None:
    source = open_source(LAYOUTS[layout](tmp_path / "set"))
    assert len(source) == len(SET)
    for index in (5, 0, 3, 4, 1, 2):  # in no order
        data, words = SET[f"{index:03d}"]
        assert source.data(index) == data
        assert source.captions(index) == (words,)
        assert source.size(index) == (24, 16)
        expected = Image.open(io.BytesIO(data)).convert("RGB")
        np.testing.assert_array_equal(np.asarray(source.picture(index)), np.asarray(expected))
    keys = [source.key(i) for i in range(len(source))]
    assert len(set(keys)) == len(SET)
    assert source.bad.count == 0
    rest = without(source, {keys[1], keys[4]})
    assert [rest.key(i) for i in range(len(rest))] == [k for i, k in enumerate(keys) if i % 3 != 1]
    assert rest.data(1) == source.data(2)
    again = open_source(tmp_path / "set")
    assert [again.key(i) for i in range(len(again))] == keys


def test_the_members_of_a_shard_lie_where_tarfile_finds_them(tmp_path: Path) -> None:
    """Long names take further headers; directories, dots and odd members are passed over."""
    deep = "a/" * 60 + "b.c/"
    members = {
        f"{deep}x.jpg": png(picture(1), "JPEG"),
        f"{deep}x.seg.png": png(picture(2)),
        f"{deep}x.txt": b"long  name\n",
        "no-ending": b"?",
        "lone.txt": b"words without a picture",
        "y.WEBP": png(picture(3), "WEBP", lossless=True),
        "y.json": b'{"caption": ["one", "", "two"], "punsafe": 0.1}',
    }
    path = shard(tmp_path / "a.tar", members)
    source = Shards([path])
    assert [source.key(i) for i in range(2)] == [f"a.tar/{deep}x", "a.tar/y"]
    assert source.data(0) == members[f"{deep}x.jpg"]
    assert source.data(1) == members["y.WEBP"]
    assert source.captions(0) == ("long name",)
    assert source.captions(1) == ("one", "two")
    assert source.fields(1)["punsafe"] == 0.1
    assert [Path(e["where"]).name for e in source.bad.listed] == ["lone"]
    with tarfile.open(path) as tar:
        reference = tar.extractfile("y.WEBP")
        assert reference is not None
        assert reference.read() == source.data(1)


def test_a_shard_that_breaks_off_gives_what_comes_before(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    big = png(Image.fromarray(noise))
    path = shard(tmp_path / "a.tar", {"1.png": SET["001"][0], "1.txt": b"one", "2.png": big})
    data = path.read_bytes()
    path.write_bytes(data[: data.index(big[:64]) + 1000])
    source = Shards([path])
    assert len(source) == 1
    assert source.bad.count == 1
    for cut in range(0, 3000, 311):  # wherever it is cut, nothing raises but a missing header
        path.write_bytes(data[:cut])
        assert len(Shards([path])) <= 2
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.add(path, "x")
    with pytest.raises(InvalidRequest, match=r"compressed \(gzip\)"):
        Shards([tmp_path / "z.tar"])


def test_ranges_of_shards() -> None:
    names = [p.as_posix() for p in expand("s/{008..011}-{0..1}.tar")]
    assert names[:3] == ["s/008-0.tar", "s/008-1.tar", "s/009-0.tar"]
    assert len(names) == 8


def test_metadata_that_is_wrong_is_listed(tmp_path: Path) -> None:
    sidecar_folder(tmp_path / "set")
    lines = [
        json.dumps({"file_name": "000.png", "text": "from the table"}),
        json.dumps({"file_name": "../secret.png", "text": "outside"}),
        json.dumps({"text": "no file"}),
        "{broken",
        json.dumps({"file_name": "gone.png", "text": "missing"}),
        json.dumps({"file_name": "001.png", "text": None}),
    ]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(lines))
    source = Folder(tmp_path / "set")
    places = {source.key(i): i for i in range(len(source))}
    assert source.captions(places["000.png"]) == ("from the table",)
    assert source.captions(places["001.png"]) == ("picture number 1",)  # its sidecar
    assert source.bad.count == 3
    with pytest.raises(BadSample, match="cannot be read"):
        source.data(places["gone.png"])


def test_bad_pictures_and_captions_say_so(tmp_path: Path) -> None:
    root = sidecar_folder(tmp_path / "set")
    (root / "000.png").write_bytes(SET["000"][0][:60])
    (root / "001.txt").write_bytes(b"\xff\xfe\x00broken")
    (root / "002.txt").write_text(" \n ")
    (root / "003.png").write_bytes(b"")
    turned = Image.Exif()
    turned[0x0112] = 6
    (root / "004.png").unlink()
    (root / "004.jpg").write_bytes(png(picture(4), "JPEG", exif=turned))
    source = open_source(root)
    for index in (0, 3):
        with pytest.raises(BadSample):
            source.picture(index)
    with pytest.raises(BadSample, match="caption"):
        source.captions(1)
    assert source.captions(2) == ()
    assert source.size(4) == source.picture(4).size == (16, 24)


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequest, match="holds no pictures"):
        open_source(tmp_path / "empty")
    with pytest.raises(InvalidRequest, match="no folder or file"):
        open_source(tmp_path / "none")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        open_source(tmp_path / "{0..3}.tar")
    with pytest.raises(InvalidRequest, match="has the splits train, test, not val"):
        open_source(saved_dataset(tmp_path / "saved"), split="val")
    with pytest.raises(InvalidRequest, match="no column words"):
        open_source(hub_parquet(tmp_path / "hub"), caption="words")
    with pytest.raises(InvalidRequest, match="SPLIT:SEED:COUNT"):
        open_source("stilllife:test")


def test_still_life_is_a_source_too() -> None:
    source = open_source("stilllife:combo:7:12")
    assert isinstance(source, StillLife)
    assert len(source) == 12
    decoded = Image.open(io.BytesIO(source.data(3)))
    assert decoded.tobytes() == source.picture(3).tobytes()
    assert source.captions(3)[0].startswith("a")
