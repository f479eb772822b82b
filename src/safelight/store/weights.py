"""Tensors on disk: safetensors by memory map, sharded or whole, and into modules.

The format is that of the safetensors project: eight bytes of little-endian header length, a
JSON header ``{name: {dtype, shape, data_offsets}}``, then the tensors one after another. The
header is checked in full before any tensor is touched, and nothing is read before it is asked
for. Pickled files are read by :mod:`safelight.store.pickles`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from safelight.errors import WeightsError
from safelight.store.pages import release

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000
_MAX_SIDES, _MAX_COUNT = 16, 2**60
_LISTED = 8
_LARGE = 2**20
"""Bytes of a tensor whose pages are worth giving back."""


class Entry(NamedTuple):
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    """Where it lies; errors name it."""
    read: Callable[[], Tensor]

    def derive(self, shape: Iterable[int], change: Callable[[Tensor], Tensor]) -> Entry:
        """The entry of ``change(tensor)``, which must have ``shape``."""
        return self._replace(shape=tuple(shape), read=lambda: change(self.read()))

    def cast(self, dtype: torch.dtype | None) -> Entry:
        """The entry in another floating-point type; whole numbers and None stay as they are."""
        if dtype is None or not self.dtype.is_floating_point:
            return self
        return self.derive(self.shape, lambda t: t.to(dtype))._replace(dtype=dtype)


class StateDict(Mapping[str, Tensor]):
    """Named tensors that are read (mapped, where the file allows it) one by one on demand.

    ``entries`` holds names, shapes and dtypes; ``extra`` holds what else the file says: a
    safetensors file's metadata, a checkpoint's ``global_step``.
    """

    def __init__(
        self, entries: Mapping[str, Entry], file: Path, extra: Mapping[str, Any] | None = None
    ) -> None:
        self.entries, self.file, self.extra = dict(entries), Path(file), dict(extra or {})

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], file: str | Path = "<memory>") -> StateDict:
        """The same face for tensors that are in memory already."""
        if isinstance(tensors, StateDict):
            return tensors
        path = Path(file)
        entries = {
            name: Entry(tuple(t.shape), t.dtype, path, lambda t=t: t) for name, t in tensors.items()
        }
        return cls(entries, path)

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def replace(self, entries: Mapping[str, Entry]) -> StateDict:
        """The same file's dictionary with other entries."""
        return StateDict(entries, self.file, self.extra)

    def renamed(self, rule: Callable[[str], str | None]) -> StateDict:
        """Every name through ``rule``; None drops the tensor.

        Raises:
            WeightsError: two names become one.
        """
        out: dict[str, Entry] = {}
        for name, entry in self.entries.items():
            new = rule(name)
            if new is None:
                continue
            if new in out:
                raise WeightsError(self.file, f"holds two tensors for {new} ({name} is one).")
            out[new] = entry
        return self.replace(out)

    def under(self, prefix: str) -> StateDict:
        """The tensors below ``prefix``, without it."""
        n = len(prefix)
        return self.renamed(lambda name: name[n:] if name.startswith(prefix) else None)


def read_weights(path: str | Path) -> StateDict:
    """Open a weights file: safetensors, an index of shards, or a pickle, by its content.

    Returns:
        its tensors, unread; a pickle's are those of its (possibly nested) ``state_dict``.

    Raises:
        WeightsError: the file is missing, truncated, corrupted, or a pickle that asks for
            anything but tensors.
    """
    path = Path(path)
    if path.name.endswith(".json"):
        return _read_index(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise WeightsError(path, f"cannot be read: {error.strerror or error}.") from error
    if start == b"version h":
        raise WeightsError(path, "is a Git LFS pointer, not the file.", "Run git lfs pull.")
    pickled = start[:2] == b"PK" or start[:1] == b"\x80"
    if pickled and path.suffix not in (".safetensors", ".sft"):
        from safelight.store.pickles import read_pickle

        return read_pickle(path)
    return _read_safetensors(path)


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` so that a reader sees the whole new file or the old one.

    The same tensors give the same bytes: names and metadata are sorted and there is no time
    stamp. Tensors may share memory or have gaps; each is written out in full.

    Args:
        path: the file; its folder is made.
        tensors: any device, any dtype of the format; moved to the CPU one at a time.
        metadata: strings; ``format: pt`` is added, which transformers asks for.
    """
    path = Path(path)
    header: dict[str, Any] = {
        "__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))
    }
    source = StateDict.of(tensors, path)
    # Widest elements first keeps every tensor aligned to its own element size.
    names = sorted(source, key=lambda n: (-source.entries[n].dtype.itemsize, n))
    offset = 0
    for name in names:
        entry = source.entries[name]
        if entry.dtype not in _NAMES:
            raise WeightsError(path, f"cannot hold {name}: {entry.dtype} is not in the format.")
        size = math.prod(entry.shape) * entry.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved there, so that no reader meets half a file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                flat = source[name].detach().cpu().contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(parts: Iterable[str]) -> str:
    """SHA-256 over digests or names, in their order."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_into(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    file: str | Path | None = None,
    allow_missing: Iterable[str] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Give ``module`` (usually built on the meta device) its weights, all or none.

    Names and shapes are compared first; only then is anything read. Tensors are assigned, not
    copied, so that mapped ones stay mapped and memory is not held twice.

    Args:
        module: its parameters and buffers become the tensors.
        tensors: what :func:`read_weights` gave, under the module's own names.
        file: named in errors; default: the one the tensors came from.
        allow_missing: patterns (``encoder.*``) of names that may be absent and keep what the
            module has.
        dtype: floating-point tensors are converted to it; None keeps the file's.

    Raises:
        WeightsError: names are missing or unknown, or shapes differ; lists them.
    """
    source = StateDict.of(tensors)
    where = file or source.file
    wanted = module.state_dict()
    patterns = tuple(allow_missing)
    missing = [
        name
        for name in wanted
        if name not in source and not any(fnmatchcase(name, p) for p in patterns)
    ]
    unknown = [name for name in source if name not in wanted]
    unlike = [
        f"{name} is {_shape(source.entries[name].shape)}, expected {_shape(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in source and source.entries[name].shape != tuple(tensor.shape)
    ]
    problems = [
        f"{len(found)} {what}: {'; '.join(found[:_LISTED])}" + ("; …" * (len(found) > _LISTED))
        for what, found in (
            ("missing", missing),
            ("unknown", unknown),
            ("of another shape", unlike),
        )
        if found
    ]
    if problems:
        raise WeightsError(
            where,
            f"does not fit {type(module).__name__} ({len(source)} tensors, {len(wanted)} "
            f"expected). Tensors {'. Tensors '.join(problems)}.",
            "Is it of another model, or is the config not its own?",
        )

    state = {name: _read(entry, dtype) for name, entry in source.entries.items()}
    module.load_state_dict(state, strict=False, assign=True)


def _read(entry: Entry, dtype: torch.dtype | None) -> Tensor:
    """A tensor in memory or mapped; what was mapped and then converted is given back at once, so
    that no model is held twice."""
    there = entry.read()
    wanted = dtype if dtype is not None and there.is_floating_point() else there.dtype
    tensor = there.to(wanted).contiguous()
    if tensor.data_ptr() != there.data_ptr() and there.nbytes >= _LARGE:
        release(there)
    return tensor


def _shape(shape: Iterable[int]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _read_index(path: Path) -> StateDict:
    """A sharded model: ``{"weight_map": {name: shard file}}`` beside its shards."""
    try:
        if path.stat().st_size > _MAX_HEADER:
            raise ValueError("too large")
        shards: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(shards.values())
        # A shard lies beside its index; a path that leaves the folder is an attack.
        if any(Path(n).name != n for n in names):
            raise ValueError("a shard outside the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(path, f"is not an index of shards: {error!r}.") from error
    files = {name: read_weights(path.parent / name) for name in sorted(names)}
    entries: dict[str, Entry] = {}
    for key, name in shards.items():
        if key not in files[name]:
            raise WeightsError(path.parent / name, f"lacks {key}, which {path.name} promises.")
        entries[key] = files[name].entries[key]
    return StateDict(entries, path)


class _Record(NamedTuple):
    """One line of a safetensors header, checked."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _read_safetensors(path: Path) -> StateDict:
    records, metadata, start = read_header(path)
    storage = map_file(path)
    entries = {
        name: Entry(r.shape, r.dtype, path, _reader(storage, start + r.begin, r))
        for name, r in records.items()
    }
    return StateDict(entries, path, metadata)


def _reader(storage: torch.UntypedStorage, at: int, record: _Record) -> Callable[[], Tensor]:
    return lambda: view(storage, at, record.dtype, math.prod(record.shape)).reshape(record.shape)


def read_header(path: Path) -> tuple[dict[str, _Record], dict[str, str], int]:
    """Check a safetensors header.

    Returns:
        records by name, the metadata, and where the tensors begin.

    Raises:
        WeightsError: anything about it is not as the format says.
    """

    def wrong(problem: str) -> WeightsError:
        return WeightsError(path, problem, "The file is truncated or corrupted; fetch it again.")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise wrong(f"is not safetensors: a header of {length} bytes in {size}.")
            text = file.read(length)
    except OSError as error:
        raise WeightsError(path, f"cannot be read: {error.strerror or error}.") from error
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values()):
            raise ValueError("metadata must be a dictionary of texts")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise wrong(f"has a broken safetensors header: {error}.") from error

    records: dict[str, _Record] = {}
    for name, raw in header.items():
        try:
            dtype, shape = _DTYPES[raw["dtype"]], tuple(raw["shape"])
            begin, end = raw["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
                raise ValueError("sizes must be whole numbers")
            if len(shape) > _MAX_SIDES or math.prod(max(n, 1) for n in shape) > _MAX_COUNT:
                raise ValueError("a shape that no tensor has")
        except (KeyError, TypeError, ValueError) as error:
            raise wrong(f"describes {name} wrongly: {error!r}.") from error
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise wrong(f"gives {name} {end - begin} bytes, but it is {_shape(shape)} {dtype}.")
        records[name] = _Record(dtype, shape, begin, end)

    at = 0
    for name, record in sorted(records.items(), key=lambda item: (item[1].begin, item[1].end)):
        if record.begin != at:
            raise wrong(f"has {'overlapping' if record.begin < at else 'stray'} bytes at {name}.")
        at = record.end
    if 8 + length + at != size:
        raise wrong(f"has {size} bytes where its header promises {8 + length + at}.")
    return records, metadata, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name occurs twice")
    return out


def map_file(path: Path) -> torch.UntypedStorage:
    """The file's bytes, mapped privately: writes to tensors never reach the file."""
    size = path.stat().st_size
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    return cast(torch.UntypedStorage, storage)


def view(storage: torch.UntypedStorage, at: int, dtype: torch.dtype, count: int) -> Tensor:
    """``count`` elements of ``storage`` from byte ``at``, ``(count,)``; shared where aligned."""
    size = dtype.itemsize
    if count == 0:
        return torch.empty(0, dtype=dtype)
    if at % size == 0:
        return torch.empty(0, dtype=dtype).set_(storage, at // size, (count,), (1,))
    raw = torch.empty(0, dtype=torch.uint8).set_(storage, at, (count * size,), (1,))
    return raw.clone().view(dtype)
