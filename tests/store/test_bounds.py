"""Strangers' bytes: whatever they are, reading ends soon, in a result or in our own error."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from safelight import provenance
from safelight.errors import SafelightError, WeightsError
from safelight.store import pickles
from safelight.store.components import read_json
from safelight.store.configs import unet_spec
from safelight.store.identify import identify
from safelight.store.pictures import read_metadata
from safelight.store.weights import read_weights

FEW = settings(max_examples=40)


def reads(path: Path) -> None:
    """Every tensor of a file is read, or an error of ours ends it."""
    with contextlib.suppress(SafelightError):
        for tensor in read_weights(path).values():
            tensor.sum()
    with contextlib.suppress(SafelightError):
        identify(path)


def mutated(data: bytes, changes: list[tuple[int, int]], cut: int) -> bytes:
    out = bytearray(data)
    for at, value in changes:
        out[at % len(out)] = value
    return bytes(out[: len(out) - cut % len(out)] if cut else out)


CHANGES = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=4)
CUTS = st.one_of(st.just(0), st.integers(0, 2000))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bounds")


# -- safetensors --------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "U8", [0, 4], [0, 2**63], [4, 0], "__metadata__"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
RECORD = st.fixed_dictionaries(
    {},
    optional={
        "dtype": JSON | st.just("F32"),
        "shape": JSON | st.lists(st.integers(-1, 2**40), max_size=4),
        "data_offsets": JSON | st.tuples(st.integers(-1, 64), st.integers(-1, 64)),
    },
)


@FEW
@given(
    header=st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), RECORD | JSON),
    tail=st.binary(max_size=64),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_safetensors_headers(place: Path, header, tail: bytes, length) -> None:
    text = json.dumps(header).encode()
    size = len(text) if length is None else length
    path = place / "h.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + text + tail)
    reads(path)


GOOD = save({"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).half()}, {"x": "y"})


@FEW
@given(changes=CHANGES, cut=CUTS)
def test_damaged_safetensors(place: Path, changes, cut: int) -> None:
    path = place / "d.safetensors"
    path.write_bytes(mutated(GOOD, changes, cut))
    reads(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"__metadata__":{"a":1}}',
        b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
    ],
)
def test_headers_that_are_meant_to_hurt(place: Path, header: bytes) -> None:
    path = place / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(WeightsError, match="broken safetensors header"):
        read_weights(path)


# -- zips and pickles ---------------------------------------------------------------------------


def archive() -> bytes:
    out = io.BytesIO()
    torch.save({"state_dict": {"a": torch.arange(5.0), "b": torch.ones(2, 2)}}, out)
    return out.getvalue()


ARCHIVE = archive()


@FEW
@given(changes=CHANGES, cut=CUTS)
def test_damaged_archives(place: Path, changes, cut: int) -> None:
    path = place / "d.ckpt"
    path.write_bytes(mutated(ARCHIVE, changes, cut))
    reads(path)


@FEW
@given(program=st.binary(max_size=60), head=st.sampled_from([b"\x80\x02", b"\x80\x04", b""]))
def test_archives_with_any_program(place: Path, program: bytes, head: bytes) -> None:
    path = place / "p.ckpt"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("x/data.pkl", head + program)
        zipped.writestr("x/data/0", bytes(8))
    reads(path)


@FEW
@given(program=st.binary(max_size=60))
def test_bare_pickles_of_any_bytes(place: Path, program: bytes) -> None:
    path = place / "p.pt"
    path.write_bytes(b"\x80\x02" + program)
    reads(path)


def test_a_program_that_asks_for_all_memory(place: Path) -> None:
    # LONG_BINPUT: the memo would become a table of four thousand million places.
    program = b"\x80\x02N" + b"r" + struct.pack("<I", 2**32 - 1) + b"."
    path = place / "memo.ckpt"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("x/data.pkl", program)
    with pytest.raises(WeightsError, match="absurd amount of memory"):
        read_weights(path)
    path.write_bytes(program)
    with pytest.raises(WeightsError, match="absurd amount of memory"):
        read_weights(path)


@pytest.mark.parametrize("member", ["data.pkl", "byteorder", "data/0"])
def test_archives_that_unpack_to_much_more(
    place: Path, member: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickles, "_MAX_PROGRAM", 2**20)
    storage = b"(X\x07\0\0\0storagectorch\nByteStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
    storage += b"J" + struct.pack("<i", 2**24) + b"tQ"
    size = b"J" + struct.pack("<i", 2**24)
    program = b"\x80\x02}X\x01\0\0\0xctorch._utils\n_rebuild_tensor_v2\n(" + storage
    program += b"K\0" + size + b"\x85K\x01\x85\x89NtRs."
    parts = {"data.pkl": program, "byteorder": b"little", "data/0": b""}
    path = place / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in parts.items():
            if name != member:
                zipped.writestr(f"x/{name}", content)
                continue
            with zipped.open(f"x/{name}", "w", force_zip64=True) as out:
                out.write(bytes(2**24))
    with pytest.raises(WeightsError, match=r"says it has|unpacks to far more"):
        read_weights(path)


def test_a_dictionary_inside_itself(place: Path) -> None:
    tree: dict = {"string_to_param": {}}
    for _ in range(40):  # every level holds the one below twice
        tree = {"a": tree, "b": tree}
    path = place / "deep.pt"
    path.write_bytes(pickle.dumps(tree, protocol=2))
    reads(path)


# -- pictures -----------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (2, 2)).save(out, "PNG")
    plain = out.getvalue()
    at = plain.index(b"IDAT") - 4
    return plain[:at] + b"".join(chunks) + plain[at:]


def shown(path: Path) -> None:
    for read in (read_metadata, provenance.read):
        with contextlib.suppress(SafelightError):
            read(path)


@FEW
@given(
    kind=st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP"]),
    key=st.sampled_from([b"safelight", b"parameters", b"other", b""]),
    data=st.binary(max_size=60),
)
def test_png_chunks(place: Path, kind: bytes, key: bytes, data: bytes) -> None:
    path = place / "c.png"
    path.write_bytes(png(chunk(kind, key + b"\0" + data)))
    shown(path)


@FEW
@given(record=st.dictionaries(st.sampled_from(["kind", "schema", "request", "x"]), JSON))
def test_records_of_any_shape(place: Path, record) -> None:
    record = {"kind": provenance.KIND, "schema": provenance.SCHEMA, **record}
    path = place / "r.png"
    path.write_bytes(png(chunk(b"tEXt", b"safelight\0" + json.dumps(record).encode())))
    shown(path)


@FEW
@given(changes=CHANGES, cut=CUTS)
def test_damaged_pictures(place: Path, changes, cut: int) -> None:
    path = place / "d.png"
    path.write_bytes(mutated(png(chunk(b"tEXt", b"parameters\0a cat\nSteps: 3")), changes, cut))
    shown(path)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_a_text_that_unpacks_to_much_more(place: Path, kind: bytes) -> None:
    packed = zlib.compress(bytes(8 * 2**20), 9)
    head = b"parameters\0\0" if kind == b"zTXt" else b"parameters\0\x01\0\0\0"
    path = place / "bomb.png"
    path.write_bytes(png(chunk(kind, head + packed)))
    shown(path)
    try:
        found = read_metadata(path)
    except SafelightError:
        return
    assert len(found.parameters or "") < 2**22


def test_deeply_nested_json(place: Path) -> None:
    path = place / "n.png"
    path.write_bytes(png(chunk(b"tEXt", b"safelight\0" + b"[" * 200_000)))
    shown(path)
    (place / "deep.json").write_text("[" * 200_000)
    with pytest.raises(WeightsError):
        read_json(place / "deep.json")


def test_absurd_configurations(place: Path) -> None:
    for key, value in (
        ("layers_per_block", 10**9),
        ("cross_attention_dim", 2**40),
        ("in_channels", -5),
    ):
        with pytest.raises(WeightsError, match="absurd"):
            unet_spec({key: value}, place / "config.json")
