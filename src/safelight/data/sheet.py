"""Pictures of any shape in rows, each above its words."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont, ImageOps

_MARGIN, _LINE, _LINES = 8, 13, 4


def picture_sheet(
    pictures: Sequence[Image.Image | None],
    words: Sequence[str],
    *,
    size: int = 192,
    columns: int = 4,
) -> Image.Image:
    """A sheet on white.

    Args:
        pictures: scaled to fit, never cropped; None leaves a grey cell.
        words: one text a picture; what does not fit into four lines is cut off.
        size: side of a cell in pixels.
        columns: cells in a row.
    """
    columns = max(1, min(columns, len(pictures)))
    rows = -(-len(pictures) // columns)
    across, down = size + _MARGIN, size + _LINES * _LINE + _MARGIN
    sheet = Image.new("RGB", (columns * across + _MARGIN, rows * down + _MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, (picture, text) in enumerate(zip(pictures, words, strict=True)):
        x, y = _MARGIN + i % columns * across, _MARGIN + i // columns * down
        if picture is None:
            draw.rectangle((x, y, x + size - 1, y + size - 1), fill=(200, 200, 200))
        else:
            small = max(picture.size) * 2 <= size
            how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            fitted = ImageOps.contain(picture.convert("RGB"), (size, size), how)
            sheet.paste(fitted, (x + (size - fitted.width) // 2, y + (size - fitted.height) // 2))
        for n, line in enumerate(wrap(text, max(8, size // 6))[:_LINES]):
            # The built-in font draws Latin only; another letter must not end the sheet.
            line = line.encode("latin-1", "replace").decode("latin-1")
            draw.text((x, y + size + 2 + n * _LINE), line, fill="black", font=font)
    return sheet
