"""Sets of small pictures in the layouts that sources read."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


SET = {f"{i:03d}": (png(picture(i)), f"picture number {i}") for i in range(6)}


def sidecar_folder(root: Path, members: Mapping[str, tuple[bytes, str]] = SET) -> Path:
    for key, (data, words) in members.items():
        path = root / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(words + "\n")
    return root


def metadata_folder(root: Path, kind: str) -> Path:
    inner = root / "train"
    inner.mkdir(parents=True)
    table = [{"file_name": f"{key}.png", "text": words} for key, (_, words) in SET.items()]
    for key, (data, _) in SET.items():
        (inner / f"{key}.png").write_bytes(data)
    if kind == "jsonl":
        (inner / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    elif kind == "csv":
        lines = [f"{row['file_name']},{row['text']}" for row in table]
        (inner / "metadata.csv").write_text("file_name,text\n" + "\n".join(lines))
    else:
        pq.write_table(pa.Table.from_pylist(table), inner / "metadata.parquet")
    return root


def shard(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard_folder(root: Path) -> Path:
    for number, keys in enumerate((list(SET)[:4], list(SET)[4:])):
        members = {}
        for key in keys:
            data, words = SET[key]
            members[f"{key}.json"] = json.dumps({"caption": words, "width": 24}).encode()
            members[f"{key}.png"] = data
            members[f"{key}.txt"] = words.encode()
        shard(root / f"{number:05d}.tar", members)
    return root


def hub_parquet(root: Path) -> Path:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (root / "data").mkdir(parents=True)
    for number, keys in enumerate((list(SET)[:4], list(SET)[4:])):
        pictures = [{"bytes": SET[k][0], "path": f"{k}.png"} for k in keys]
        columns = {"image": pa.array(pictures, kind), "text": [SET[k][1] for k in keys]}
        path = root / "data" / f"train-{number:05d}-of-00002.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=3)
    return root


def saved_dataset(root: Path) -> Path:
    """As ``datasets.DatasetDict.save_to_disk`` lays it out."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    inner = root / "train"
    inner.mkdir(parents=True)
    pictures = [{"bytes": data, "path": None} for data, _ in SET.values()]
    table = pa.table({"image": pa.array(pictures, kind), "text": [w for _, w in SET.values()]})
    with pa.ipc.new_stream(inner / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=4)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"}
    (inner / "state.json").write_text(json.dumps(state))
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return root
