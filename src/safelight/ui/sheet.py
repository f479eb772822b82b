"""The sheet of a grid: pictures in rows, columns and blocks, with what changes along each."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

_GAP, _INK, _GREY = 6, "#26221f", "#d9d4ce"


def sheet(
    pictures: Mapping[tuple[int, int, int], Image.Image | None],
    x: Sequence[str],
    y: Sequence[str],
    z: Sequence[str] = (),
    *,
    most: int = 4096,
) -> Image.Image:
    """Draw it on white.

    Args:
        pictures: by their place (x, y, z); missing ones are grey.
        x, y, z: labels of columns, rows and blocks; an empty row of labels is one place without.
        most: longest side of the sheet in pixels; pictures are made smaller for it.
    """
    columns, rows, blocks = max(1, len(x)), max(1, len(y)), max(1, len(z))
    shapes = [picture.size for picture in pictures.values() if picture is not None] or [(128, 128)]
    wide, high = max(w for w, _ in shapes), max(h for _, h in shapes)
    if wide < 96:  # labels want room
        wide, high = wide * 4, high * 4
    scale = min(1.0, most / (columns * wide), most / (rows * blocks * high))
    wide, high = max(16, int(wide * scale)), max(16, int(high * scale))
    font = ImageFont.load_default(max(11, min(28, wide // 9)))
    line = int(font.getbbox("Ag")[3]) + 6
    left = max([0, *(int(font.getlength(_plain(label))) + 2 * _GAP for label in y)])
    left = min(left, 3 * wide)
    top, head = (line + _GAP if any(x) else 0), (line + _GAP if any(z) else 0)
    block = head + top + rows * (high + _GAP)
    made = Image.new("RGB", (left + columns * (wide + _GAP) + _GAP, blocks * block + _GAP), "white")
    draw = ImageDraw.Draw(made)
    for b in range(blocks):
        at = b * block + _GAP
        if any(z):
            _write(draw, (made.width // 2, at), z[b], font, made.width - 2 * _GAP)
        for c in range(columns if any(x) else 0):
            middle = left + c * (wide + _GAP) + _GAP + wide // 2
            _write(draw, (middle, at + head), x[c], font, wide)
        for r in range(rows):
            place = at + head + top + r * (high + _GAP)
            if any(y):
                _write(draw, (left // 2, place + (high - line) // 2), y[r], font, left - _GAP)
            for c in range(columns):
                corner = (left + c * (wide + _GAP) + _GAP, place)
                _paste(made, draw, corner, (wide, high), pictures.get((c, r, b)))
    return made


def png(image: Image.Image) -> bytes:
    """As a file."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _paste(
    made: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    size: tuple[int, int],
    picture: Image.Image | None,
) -> None:
    x, y = corner
    if picture is None:
        draw.rectangle((x, y, x + size[0] - 1, y + size[1] - 1), fill=_GREY)
        return
    how = Image.Resampling.LANCZOS if picture.width > size[0] else Image.Resampling.NEAREST
    fitted = ImageOps.contain(picture.convert("RGB"), size, how)
    made.paste(fitted, (x + (size[0] - fitted.width) // 2, y + (size[1] - fitted.height) // 2))


def _write(
    draw: ImageDraw.ImageDraw,
    middle: tuple[int, int],
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    room: int,
) -> None:
    """One line around ``middle``, cut to the room there is."""
    text = _plain(text)
    if font.getlength(text) > room:
        while text and font.getlength(text + "…") > room:
            text = text[:-1]
        text += "…"
    draw.text((middle[0] - font.getlength(text) / 2, middle[1]), text, fill=_INK, font=font)


def _plain(text: str) -> str:
    return " ".join(text.split())
