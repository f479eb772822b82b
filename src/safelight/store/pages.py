"""Pages of mapped files, given back to the system when they have been read."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from torch import Tensor

_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)


def release(*tensors: Tensor) -> None:
    """Give back the pages of tensors that are mapped from a file: the next use reads them again.

    Weights never change, so nothing is lost with them; tensors in memory are left alone, and so is
    all of it on other systems than Linux.
    """
    if _DONTNEED is None or not (files := _mapped_files()):
        return
    page, advise = mmap.PAGESIZE, _madvise()
    for tensor in tensors:
        if tensor.device.type != "cpu":
            continue
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if not any(low <= start and end <= high for low, high in files):
            continue
        # Whole pages alone: what lies in the others may be another tensor's.
        low, high = -(-start // page) * page, end // page * page
        if high > low:
            advise(low, high - low, _DONTNEED)


def _mapped_files() -> list[tuple[int, int]]:
    """Where files of a megabyte and more are mapped, for reading, into this process."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        place, rights, _, _, inode, *_ = line.split()
        low, high = (int(number, 16) for number in place.split("-"))
        if inode != "0" and "x" not in rights and high - low >= 2**20:
            found.append((low, high))
    return found


def _madvise() -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
