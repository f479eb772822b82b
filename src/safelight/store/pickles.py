"""Pickled checkpoints (``.ckpt .bin .pt``), read by a reader that can build tensors only.

A pickle is a program: it may ask for any function of any installed module and call it. This
reader answers to a short list of names, each of which gives an inert description; every other
name ends the reading with an error. Layouts: torch's zip archives (since 1.6), with storages
mapped from the file, and the older stream of pickles followed by raw storages.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from safelight.errors import WeightsError
from safelight.store.weights import Entry, StateDict, map_file, view

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Trainers leave instances of their own classes in checkpoints (callbacks, hyper-parameters).
# They become empty records.
_INERT = re.compile(r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|ldm)(\.|$)")
_MAX_NESTING = 8
_MAX_PROGRAM = 2**28
_MAX_OPERATIONS = 2**24
_MAX_RATIO = 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class _Refused(Exception):
    """The pickle asks for something that is not on the list."""


class _Storage:
    """A storage by its key; where its bytes are is filled in by the layout's reader."""

    __slots__ = ("at", "count", "dtype", "key", "source")

    def __init__(self, key: str, dtype: torch.dtype, count: int) -> None:
        self.key, self.dtype, self.count = key, dtype, count
        self.source: torch.UntypedStorage | None = None
        self.at = 0

    def __setstate__(self, state: Any) -> NoReturn:
        raise _Refused("changes a storage")


class _TensorRef(NamedTuple):
    """A tensor as the pickle describes it."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        assert self.storage.source is not None
        flat = view(self.storage.source, self.storage.at, self.storage.dtype, self.storage.count)
        return flat.as_strided(self.size, self.stride, flat.storage_offset() + self.offset)


class _Allowed:
    """A name that the pickle may call. Sealed: a pickle can set attributes on what it holds."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "call", call)

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise _Refused("changes a function")


class _NumpyType:
    """Stands in for ``numpy.dtype``, whose own state setter trusts its input."""

    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any) -> None:
        if not (isinstance(code, str) and re.fullmatch(r"[<=|]?([iuf][1248]|b1)", code)):
            raise _Refused(f"asks for the numpy type {code!r}")
        self.code = code.lstrip("<=|")

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            raise _Refused("holds big-endian numbers")


def _numpy_scalar(kind: Any, data: Any = None) -> int | float | bool:
    if not (isinstance(kind, _NumpyType) and isinstance(data, bytes)):
        raise _Refused("builds a numpy scalar of an odd kind")
    dtype = np.dtype("<" + kind.code)
    if len(data) != dtype.itemsize:
        raise _Refused("builds a numpy scalar of the wrong size")
    return np.frombuffer(data, dtype)[0].item()


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _TensorRef:
    """``torch._utils._rebuild_tensor_v2``; gradients and hooks are left out."""
    numbers = (offset, *size, *stride)
    if (
        not isinstance(storage, _Storage)
        or len(size) != len(stride)
        or not all(type(n) is int and n >= 0 for n in numbers)
    ):
        raise _Refused("describes a tensor wrongly")
    if math.prod(size):
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= storage.count:
            raise _Refused("describes a tensor that reaches outside its storage")
    return _TensorRef(storage, offset, tuple(size), tuple(stride))


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _latin1(text: Any, encoding: Any) -> bytes:
    """``_codecs.encode``, which protocol 2 uses for bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _Refused("encodes text other than bytes")
    return text.encode("latin-1")


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": tuple,
    "torch.device": lambda *_: None,
    "collections.OrderedDict": lambda *pairs: _Plain(*pairs),
    "collections.defaultdict": lambda *_: {},
    "_codecs.encode": _latin1,
    "numpy.dtype": _NumpyType,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    **{f"{b}.{t.__name__}": t for b in ("builtins", "__builtin__") for t in (set, list, dict)},
}


class _Plain(dict):
    """An ordered dictionary whose extra attributes (``_metadata``) are forgotten."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Parameters(dict):
    """``torch.nn.ParameterDict``, as the first textual inversions were saved: its tensors only."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        inner = state.get("_parameters") if isinstance(state, dict) else None
        if isinstance(inner, dict):
            self.update(inner)


class _Unpickler(pickle.Unpickler):
    """Builds :class:`_TensorRef` and plain containers; refuses every other name."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file, encoding="utf-8")
        self.path = path
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        if name in _CALLS:
            return _Allowed(_CALLS[name])
        if module_name in ("torch", "torch.storage") and global_name in _STORAGES:
            return _STORAGES[global_name]
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        if name == "torch.nn.modules.container.ParameterDict":
            return _Parameters
        if _INERT.match(module_name):
            return _inert(global_name)
        raise _Refused(f"asks for {name}")

    def persistent_load(self, pid: Any) -> _Storage:
        try:
            kind, dtype, key, _, count = pid[:5]
            # A sixth field, in the old layout, views one storage through another.
            if kind != "storage" or not isinstance(dtype, torch.dtype) or any(pid[5:]):
                raise ValueError
            if type(count) is not int or count < 0 or not isinstance(key, str):
                raise ValueError
        except (ValueError, TypeError) as error:
            raise _Refused("describes a storage wrongly") from error
        known = self.storages.setdefault(key, _Storage(key, dtype, count))
        if (known.dtype, known.count) != (dtype, count):
            raise _Refused(f"describes storage {key} in two ways")
        return known


def _inert(name: str) -> type:
    """A new empty class: takes any arguments, state and items, does nothing."""

    def ignore(*_: Any, **__: Any) -> None:
        return None

    def new(cls: type, *_: Any, **__: Any) -> Any:
        return dict.__new__(cls)

    members = {"__new__": new, "__init__": ignore, "__setstate__": ignore}
    members |= {"append": ignore, "extend": ignore, "__hash__": object.__hash__}
    return type(name, (dict,), members)


def read_pickle(path: Path) -> StateDict:
    """Open a pickled checkpoint.

    Returns:
        the tensors of its ``state_dict`` (nested ones are followed; without one, those of the
        outermost dictionary), unread. ``extra`` has the numbers and strings beside it.

    Raises:
        WeightsError: it is broken, holds no tensors, or asks for anything else than tensors;
            in that case nothing of it has been run.
    """
    tree = _read(path)
    extra: dict[str, Any] = {}
    for _ in range(_MAX_NESTING):
        if not isinstance(tree, dict):
            break
        extra |= {
            k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, int | float | str)
        }
        if not isinstance(tree.get("state_dict"), dict):
            break
        tree = tree["state_dict"]
    entries = {
        key: _entry(ref, path)
        for key, ref in (tree.items() if isinstance(tree, dict) else ())
        if isinstance(ref, _TensorRef) and isinstance(key, str)
    }
    if not entries:
        raise WeightsError(path, "holds no named tensors.")
    return StateDict(entries, path, extra)


def read_tree(path: Path) -> Any:
    """What was pickled, as it was nested: dictionaries, an outermost tuple, numbers, strings,
    unread tensors.

    Other objects become None.

    Raises:
        WeightsError: as :func:`read_pickle`.
    """

    seen: dict[int, Any] = {}  # a dictionary may be in many places, or in itself

    def plain(value: Any, depth: int) -> Any:
        if isinstance(value, _TensorRef):
            return _entry(value, path)
        if isinstance(value, dict) and depth < _MAX_NESTING:
            if id(value) not in seen:
                out = seen[id(value)] = {}
                out |= {k: plain(v, depth + 1) for k, v in value.items() if isinstance(k, str)}
            return seen[id(value)]
        if isinstance(value, list | tuple) and depth == 0:
            return tuple(plain(v, 1) for v in value)
        return value if isinstance(value, int | float | str | bool) else None

    return plain(_read(path), 0)


def _entry(ref: _TensorRef, path: Path) -> Entry:
    return Entry(ref.size, ref.storage.dtype, path, ref.read)


def _read(path: Path) -> Any:
    """The tree of containers and tensor descriptions.

    Raises:
        WeightsError: as :func:`read_pickle`.
    """
    try:
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_stream(path)
    except _Refused as error:
        raise WeightsError(
            path,
            f"is a pickle that {error}, which is not a tensor; nothing was run.",
            "Use a safetensors file of the model.",
        ) from error
    except WeightsError:
        raise
    except Exception as error:  # a broken pickle raises nearly anything
        raise WeightsError(path, f"is not a readable checkpoint: {error!r}.") from error


def _read_zip(path: Path) -> Any:
    """torch's archive: ``*/data.pkl`` and one file ``*/data/<key>`` a storage."""
    mapped: torch.UntypedStorage | None = None
    unpacked = 0
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise WeightsError(path, "is an archive, but not one of tensors (no data.pkl).")
        root = pickles[0].removesuffix("data.pkl")
        order = members.get(f"{root}byteorder")
        if order is not None and _member(archive, order, 16) != b"little":
            raise WeightsError(path, "holds big-endian tensors, which are not supported.")
        program = io.BytesIO(_member(archive, members[pickles[0]], _MAX_PROGRAM))
        _bounded(program)
        unpickler = _Unpickler(program, path)
        tree = unpickler.load()
        for storage in unpickler.storages.values():
            info = members.get(f"{root}data/{storage.key}")
            if info is None or info.file_size != storage.count * storage.dtype.itemsize:
                raise WeightsError(path, f"has a storage {storage.key} of the wrong size.")
            if info.compress_type == zipfile.ZIP_STORED:
                mapped = map_file(path) if mapped is None else mapped
                storage.source, storage.at = mapped, _data_offset(path, info)
            elif storage.count:
                # torch stores; whoever packs may do so, but not a whole memory into a small file.
                unpacked += info.file_size
                if unpacked > _MAX_RATIO * path.stat().st_size:
                    raise WeightsError(path, "unpacks to far more than it holds.")
                storage.source = _from_bytes(archive.read(info))
    return tree


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
    if info.file_size > most:
        raise WeightsError(archive.filename, f"{info.filename} says it has {info.file_size} bytes.")
    return archive.read(info)


def _bounded(file: Any) -> None:
    """Look at the program before it is run, and come back.

    Raises:
        _Refused: it is absurdly long, or asks for absurdly much memory.
    """
    start = file.tell()
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if count > _MAX_OPERATIONS:
            raise _Refused("is absurdly long")
        # The memo is a table as long as its highest number.
        if "PUT" in operation.name and isinstance(argument, int) and argument > _MAX_OPERATIONS:
            raise _Refused("asks for an absurd amount of memory")
    file.seek(start)


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: its local header has its own length."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise WeightsError(path, f"has a broken archive entry {info.filename}.")
        name, extra = struct.unpack("<HH", header[26:30])
    begin = info.header_offset + 30 + name + extra
    if begin + info.file_size > path.stat().st_size:
        raise WeightsError(path, f"is truncated at {info.filename}.")
    return begin


def _read_stream(path: Path) -> Any:
    """The layout before torch 1.6: magic, protocol, system, object, keys, then storages."""
    with path.open("rb") as file:
        if _load(file, path) != _LEGACY_MAGIC:
            raise WeightsError(path, "is a pickle, but not one that torch wrote.")
        if _load(file, path) != _LEGACY_PROTOCOL:
            raise WeightsError(path, "has an unknown version of torch's old layout.")
        system = _load(file, path)
        if not (isinstance(system, dict) and system.get("little_endian", True)):
            raise WeightsError(path, "holds big-endian tensors, which are not supported.")
        _bounded(file)
        unpickler = _Unpickler(file, path)
        tree = unpickler.load()
        keys = _load(file, path)
        size = path.stat().st_size
        mapped = map_file(path)
        at = file.tell()
        for key in keys:
            storage = unpickler.storages[key]
            file.seek(at)
            (count,) = struct.unpack("<q", file.read(8))
            end = at + 8 + storage.count * storage.dtype.itemsize
            if count != storage.count or end > size:
                raise WeightsError(path, f"is truncated or has a wrong storage {key}.")
            storage.source, storage.at = mapped, at + 8
            at = end
    if any(s.source is None for s in unpickler.storages.values()):
        raise WeightsError(path, "lacks a storage that its tensors ask for.")
    return tree


def _load(file: Any, path: Path) -> Any:
    _bounded(file)
    return _Unpickler(file, path).load()


def _from_bytes(data: bytes) -> torch.UntypedStorage:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage()
