"""Pictures that come with a request: a path, a file's bytes, a PIL picture or an array. No torch.

What was given is read and hashed once, when the request is made, so that what is hashed is what
is used. In JSON a picture is its digest alone; a request that is read back from JSON holds only
that, and whoever makes its pictures again gives the file again.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

MAX_BYTES = 256 * 2**20
"""Larger files are refused unread."""
_DIGEST = re.compile(r"(sha256|pixels):[0-9a-f]{64}")
_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+(;[\w=.-]+)*;base64,", re.IGNORECASE)
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class PictureInput:
    """A picture as it was given.

    Args:
        value: a file's bytes, a PIL picture or an array; None where only the digest is known.
        digest: ``sha256:`` and the hash of a file's bytes, as ``sha256sum`` prints it, or
            ``pixels:`` and the hash of a picture that never was a file.
    """

    def __init__(self, value: bytes | Image | np.ndarray | None, digest: str) -> None:
        self.value, self.digest = value, digest

    def __repr__(self) -> str:
        return f"<picture {self.digest[:19]}…>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PictureInput) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height the right way up, from the file's header alone.

        Raises:
            ValueError: it cannot be read, or is not here.
        """
        if self.value is None:
            raise ValueError(f"is known by its digest alone ({self.digest}). Give the file again.")
        if isinstance(self.value, bytes):
            from PIL import Image, UnidentifiedImageError

            try:
                with Image.open(io.BytesIO(self.value)) as image:
                    return _upright(image)
            except Image.DecompressionBombError as error:
                raise ValueError(f"is too large: {error}") from error
            except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
                raise ValueError("is not a picture that can be read.") from error
        if hasattr(self.value, "mode"):
            return _upright(self.value)  # type: ignore[arg-type]
        height, width = self.value.shape[:2]  # type: ignore[union-attr]
        return int(width), int(height)


def picture_input(value: Any) -> PictureInput:
    """Read and hash a picture.

    Args:
        value: a path, bytes, a PIL picture, an array, or the digest of one.

    Raises:
        ValueError: no such file, too large, or nothing of these.
    """
    if isinstance(value, PictureInput):
        return value
    if is_digest(value):
        return PictureInput(None, value)
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        if len(data) > MAX_BYTES:
            raise ValueError(_too_many(len(data)))
        return PictureInput(data, f"sha256:{hashlib.sha256(data).hexdigest()}")
    if isinstance(value, str | os.PathLike):
        data = _read(Path(value).expanduser())
        return PictureInput(data, f"sha256:{hashlib.sha256(data).hexdigest()}")
    if hasattr(value, "mode") and hasattr(value, "tobytes"):  # PIL, without importing it
        return PictureInput(value.copy(), _hash(f"{value.mode}:{value.size}", value.tobytes()))
    if hasattr(value, "__array_interface__") and hasattr(value, "tobytes"):
        if value.ndim not in (2, 3) or 0 in value.shape:
            raise ValueError(f"is an array of shape {tuple(value.shape)}, not (H, W[, C]).")
        return PictureInput(value.copy(), _hash(f"{value.dtype}:{value.shape}", value.tobytes()))
    raise ValueError(
        f"must be a path, a file's bytes, a PIL picture or an array, not {type(value).__name__}."
    )


def decoded(text: str) -> bytes:
    """A picture's bytes from base64 or a data URL.

    Raises:
        ValueError: it is neither.
    """
    try:
        return base64.b64decode(_DATA_URL.sub("", text.strip(), count=1), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is not base64.") from None


def is_digest(value: object) -> bool:
    """Whether ``value`` is what JSON holds of a picture."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def picture_inputs(values: Any) -> tuple[PictureInput, ...]:
    """Several pictures; one alone is a list of one."""
    if isinstance(values, list | tuple):
        return tuple(picture_input(value) for value in values)
    return (picture_input(values),)


def numbers(values: Any) -> tuple[float, ...]:
    """A row of numbers: a list, or anything with ``tolist()``; a leading 1 in its shape is fine.

    Raises:
        ValueError: it is none.
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    while isinstance(values, Sequence) and len(values) == 1 and isinstance(values[0], list | tuple):
        values = values[0]
    if not isinstance(values, list | tuple) or not values:
        raise ValueError("must be a row of numbers.")
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise ValueError("must be a row of numbers.")
    return tuple(float(v) for v in values)


def fitting(
    size: tuple[int, int],
    native: int,
    step: int,
    width: int | None = None,
    height: int | None = None,
) -> tuple[int, int]:
    """Width and height to make a picture in that starts from one of ``size``.

    Its own, in whole steps. Far from the model's native area (half to twice) it is scaled to that;
    where one side is given, the other follows.
    """
    wide, high = size
    share = wide * high / native**2
    scale = 1.0 if 0.5 <= share <= 2 else share**-0.5
    if width or height:
        scale = width / wide if width else (height or 0) / high
    # A hair more, so that a side that fits is not cut by rounding.
    wide, high = (max(step, int(side * scale / step + 1e-6) * step) for side in size)
    return width or wide, height or high


def enlarged(size: tuple[int, int], factor: int, most: int) -> tuple[int, int]:
    """Width and height of a picture ``factor`` times as large a side, from sides cut to fours.

    Raises:
        ValueError: more than ``most`` a side.
    """
    wide, high = (max(4, side - side % 4) * factor for side in size)
    if max(wide, high) > most:
        raise ValueError(
            f"becomes {wide}x{high}, more than {most} a side. "
            "Give a smaller picture, or width and height."
        )
    return wide, high


def _hash(head: str, data: bytes) -> str:
    return f"pixels:{hashlib.sha256(head.encode() + data).hexdigest()}"


def _upright(image: Image) -> tuple[int, int]:
    turned = image.getexif().get(0x0112) in _TURNED
    return (image.height, image.width) if turned else (image.width, image.height)


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a device would never end
            raise ValueError(f"{path} is not a file.")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(_too_many(path.stat().st_size))
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"no file {path}.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None


def _too_many(count: int) -> str:
    return f"has {count / 2**20:.0f} MiB, more than {MAX_BYTES / 2**20:.0f}. Make it smaller first."
