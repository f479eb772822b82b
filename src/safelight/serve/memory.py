"""How much memory this process has, and giving back what it no longer needs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys
from pathlib import Path

import torch


def resident_bytes() -> int:
    """Main memory that the process holds now; where the system does not say, the most it held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


def device_bytes() -> int:
    """Memory of accelerators that tensors of this process hold; 0 without one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return sum(torch.cuda.memory_allocated(k) for k in range(torch.cuda.device_count()))
    if torch.backends.mps.is_available():
        return torch.mps.current_allocated_memory()
    return 0


def give_back() -> None:
    """Return free memory to the system: Python's cycles, the accelerator's cache, malloc's."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
