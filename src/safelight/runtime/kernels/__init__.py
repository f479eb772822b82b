"""The optional C kernels: found and loaded here, called through ``ctypes``.

They are compiled while the package is built (``hatch_build.py``). Everything that calls them has
a way in PyTorch for where :func:`library` is None.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

log = logging.getLogger(__name__)

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "sl_norm_work": (_LONG, [_LONG, _LONG, _LONG]),
    **{
        f"sl_{kind}_norm_forward": (None, [_POINTER] * 6 + [_LONG] * 4 + [_FLOAT, _INT, _INT])
        for kind in ("f32", "bf16")
    },
    **{
        f"sl_{kind}_norm_backward": (None, [_POINTER] * 9 + [_LONG] * 4 + [_INT, _INT])
        for kind in ("f32", "bf16")
    },
    **{
        f"sl_{kind}_norm_affine": (None, [_POINTER] * 6 + [_LONG] * 4 + [_FLOAT, _INT])
        for kind in ("f32", "bf16")
    },
    "sl_winograd_level": (_INT, []),
    "sl_winograd_packed": (_LONG, [_LONG] * 2 + [_INT] * 2),
    "sl_winograd_pack": (None, [_POINTER] * 2 + [_LONG] * 2 + [_INT] * 3),
    "sl_winograd_work": (_LONG, [_LONG] * 5 + [_INT] * 4),
    "sl_winograd": (None, [_POINTER] * 7 + [_LONG] * 6 + [_INT] * 5),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where the package was built without them."""
    # OpenMP must be PyTorch's own copy, which is there once torch is imported: a second one
    # would keep a second set of threads.
    import torch  # noqa: F401

    path = Path(__file__).with_name("libsafelight.so")
    try:
        found = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        log.info("no kernels, PyTorch does the work: %s", error)
        return None
    return found
