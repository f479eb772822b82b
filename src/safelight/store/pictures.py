"""Pictures in and out, and what a picture's file says about how it was made.

PNG keeps A1111's text under ``parameters`` and our JSON under ``safelight``. JPEG and WebP keep
the first in EXIF ``UserComment``, as A1111 does, and the second in EXIF ``MakerNote``. All three
carry an XMP packet which says that a machine made the picture (:mod:`~.xmp`), with or without the
other two. There is no time in any of them: the same picture and texts give the same bytes.
"""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from safelight.errors import InvalidRequest
from safelight.store.xmp import MARK

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded."""

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_READABLE = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_EXIF_IFD, _USER_COMMENT, _MAKER_NOTE = 0x8769, 0x9286, 0x927C
_OWN_NOTE = b"safelight\0"
_PNG_XMP = "XML:com.adobe.xmp"
_JPEG_EXIF_LIMIT = 65_000

Source = str | Path | bytes | Image.Image | np.ndarray


@dataclass(frozen=True)
class Metadata:
    """Texts found in a picture's file.

    Attributes:
        parameters: A1111's text, or None.
        json: our canonical JSON as it was written, or None.
        xmp: the XMP packet, or None.
        other: other programs' texts by name (``prompt``, ``workflow``, ``invokeai_metadata`` …).
    """

    parameters: str | None = None
    json: str | None = None
    xmp: str | None = None
    other: Mapping[str, str] = field(default_factory=dict)


def open_picture(
    source: Source,
    *,
    field: str = "image",
    background: tuple[int, int, int] | None = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Any picture as 8-bit RGB, the right way up.

    Args:
        source: a path, a file's bytes, a PIL picture, or an array: uint8 or float in [0, 1],
            ``(H, W)`` or ``(H, W, 1 | 3 | 4)``.
        field: the argument's name, for errors.
        background: what shows through transparent pixels; None drops the alpha channel.
        max_pixels: larger ones are refused before they are decoded.

    Raises:
        InvalidRequest: missing, not a picture, broken, or too large.
    """
    image = opened(source, field=field, max_pixels=max_pixels)
    try:
        return _rgb(image, background)
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidRequest(field, f"is broken: {error}.") from error


def opened(source: Source, *, field: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Any picture the right way up, in the mode it has. Arguments as :func:`open_picture`."""
    if isinstance(source, np.ndarray):
        image = _from_array(source, field)
    elif isinstance(source, Image.Image):
        image = source
    else:
        image = _open(source, field, max_pixels)
    if image.width * image.height > max_pixels:
        raise _too_large(image, field, max_pixels)
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidRequest(field, f"is broken: {error}.") from error


def encode(
    image: Image.Image,
    format: str = "PNG",
    parameters: str = "",
    record: str = "",
    *,
    quality: int = 95,
    xmp: bytes = MARK,
) -> bytes:
    """A picture's file as bytes, with its texts.

    Args:
        image: RGB.
        format: ``PNG``, ``JPEG`` or ``WEBP``.
        parameters: A1111's text; empty: none is written.
        record: our JSON; empty: none is written.
        quality: 1 to 100, of JPEG and WebP. JPEG keeps colour at full resolution.
        xmp: an XMP packet. The default says that a machine made the picture.

    Raises:
        InvalidRequest: the texts do not fit into a JPEG, or the format is unknown.
    """
    out = io.BytesIO()
    if format == "PNG":
        texts = PngImagePlugin.PngInfo()
        for key, text in (("parameters", parameters), ("safelight", record)):
            if text:
                _add_text(texts, key, text)
        if xmp:
            texts.add_itxt(_PNG_XMP, xmp.decode())
        image.save(out, "PNG", pnginfo=texts)
    elif format in ("JPEG", "WEBP"):
        exif = _exif(parameters, record)
        if format == "JPEG" and len(exif) > _JPEG_EXIF_LIMIT:
            raise InvalidRequest(
                "output", f"a JPEG cannot hold {len(exif)} bytes of texts.", "Write PNG or WebP."
            )
        if format == "JPEG":
            image.save(out, "JPEG", quality=quality, subsampling=0, exif=exif, xmp=xmp)
        else:
            image.save(out, "WEBP", quality=quality, method=4, exif=exif, xmp=xmp)
    else:
        raise InvalidRequest("output", f"unknown format {format!r}.", "PNG, JPEG or WEBP.")
    return out.getvalue()


def save(
    path: str | Path,
    image: Image.Image,
    parameters: str = "",
    record: str = "",
    *,
    quality: int = 95,
    xmp: bytes = MARK,
) -> None:
    """Write a picture; the ending chooses the format. A reader never sees half a file.

    Raises:
        InvalidRequest: an ending other than .png, .jpg, .jpeg, .webp; see :func:`encode`.
    """
    write(path, encode(image, format_of(path), parameters, record, quality=quality, xmp=xmp))


def format_of(path: str | Path) -> str:
    """The format that a file's ending stands for.

    Raises:
        InvalidRequest: an ending other than .png, .jpg, .jpeg, .webp.
    """
    ending = Path(path).suffix
    if ending.lower() not in FORMATS:
        raise InvalidRequest(
            "output", f"cannot write {ending or 'a file without ending'}.",
            f"Use {', '.join(FORMATS)}.",
        )  # fmt: skip
    return FORMATS[ending.lower()]


def write(path: str | Path, data: bytes) -> None:
    """Put a file in its place at once: a reader sees the old one or all of the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_metadata(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Metadata:
    """The texts in a picture's file, ours and other programs'.

    Raises:
        InvalidRequest: missing, not a picture, broken, or too large.
    """
    with _open(source, "picture", max_pixels) as image:
        try:
            # PNG allows texts behind the pixels; ``text`` reads to the end.
            texts = dict(image.text) if isinstance(image, PngImagePlugin.PngImageFile) else {}
            exif = image.getexif()
            packet = image.info.get("xmp")
        except (OSError, ValueError, SyntaxError) as error:
            raise InvalidRequest("picture", f"is broken: {error}.") from error
    found = {key: str(text) for key, text in texts.items()}
    parameters, record = found.pop("parameters", None), found.pop("safelight", None)
    in_text = found.pop(_PNG_XMP, None)
    packet = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else in_text
    inner = exif.get_ifd(_EXIF_IFD)
    comment, note = inner.get(_USER_COMMENT), inner.get(_MAKER_NOTE)
    if parameters is None and comment:
        parameters = _decode_comment(comment)
    if record is None and isinstance(note, bytes) and note.startswith(_OWN_NOTE):
        record = note.removeprefix(_OWN_NOTE).decode("utf-8", "replace")
    return Metadata(parameters, record, packet, found)


def _open(source: str | Path | bytes, field: str, max_pixels: int) -> Image.Image:
    """Open without decoding, so that the size is known first."""
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
        image = Image.open(file, formats=_READABLE)
    except FileNotFoundError as error:
        raise InvalidRequest(field, f"no file {source}.") from error
    except Image.DecompressionBombError as error:
        raise InvalidRequest(field, f"is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise InvalidRequest(
            field, "is not a picture that can be read.", f"One of {', '.join(_READABLE)}."
        ) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidRequest(field, f"cannot be read: {error}.") from error
    if image.width * image.height > max_pixels:
        raise _too_large(image, field, max_pixels)
    return image


def _too_large(image: Image.Image, field: str, max_pixels: int) -> InvalidRequest:
    return InvalidRequest(
        field,
        f"is {image.width}x{image.height}, more than {max_pixels / 1e6:g} million pixels.",
        "Make it smaller first.",
    )


def _from_array(array: np.ndarray, field: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise InvalidRequest(
            field, f"an array of shape {array.shape}.", "Expected (H, W) or (H, W, 1, 3 or 4)."
        )
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise InvalidRequest(field, "a float array with values outside [0, 1].")
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InvalidRequest(field, f"an array of {array.dtype}.", "Expected uint8 or float.")
    return Image.fromarray(np.ascontiguousarray(array))


def _rgb(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16 bits a pixel: PIL's own conversion would clip to 255.
        values = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(np.round(values.clip(0, 255)).astype(np.uint8))
    if image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(np.round(values.clip(0, 255)).astype(np.uint8))
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if transparent and background is not None:
        layer = image.convert("RGBA")
        below = Image.new("RGBA", layer.size, (*background, 255))
        return Image.alpha_composite(below, layer).convert("RGB")
    if image.mode != "RGB":
        return image.convert("RGBA").convert("RGB") if transparent else image.convert("RGB")
    image.load()
    return image.copy()


def _add_text(texts: PngImagePlugin.PngInfo, key: str, text: str) -> None:
    """tEXt where Latin-1 suffices, as A1111 does; iTXt (UTF-8) otherwise."""
    clean = text.replace("\0", "")
    try:
        clean.encode("latin-1")
        texts.add_text(key, clean)
    except UnicodeEncodeError:
        texts.add_itxt(key, clean.encode("utf-8", "replace").decode())


def _exif(parameters: str, record: str) -> bytes:
    exif = Image.Exif()
    inner: dict[int, bytes] = {}
    if parameters:
        inner[_USER_COMMENT] = b"UNICODE\0" + parameters.encode("utf-16-be", "replace")
    if record:
        inner[_MAKER_NOTE] = _OWN_NOTE + record.encode("utf-8", "replace")
    if not inner:
        return b""
    exif[_EXIF_IFD] = inner
    return exif.tobytes()


def _decode_comment(comment: bytes | str) -> str:
    """An EXIF ``UserComment``: eight bytes name the encoding."""
    if isinstance(comment, str):
        return comment
    kind, body = comment[:8], comment[8:]
    if kind == b"UNICODE\0":
        # The standard leaves the byte order open. Most text has more zero bytes in the high
        # halves.
        little = body[1::2].count(0) > body[0::2].count(0)
        return body.decode("utf-16-le" if little else "utf-16-be", "replace")
    if kind in (b"ASCII\0\0\0", b"\0" * 8):
        return body.decode("utf-8", "replace").rstrip("\0")
    return comment.decode("utf-8", "replace").rstrip("\0")
