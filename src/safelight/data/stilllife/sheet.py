"""A contact sheet: pictures in rows, each above its caption."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from PIL import Image, ImageDraw

from safelight.data.stilllife.captions import plain_caption
from safelight.data.stilllife.render import render
from safelight.data.stilllife.world import Scene


def contact_sheet(
    scenes: Sequence[Scene],
    *,
    captions: Sequence[str] | None = None,
    size: int = 64,
    scale: int = 3,
    columns: int = 6,
) -> Image.Image:
    """Draw scenes at `size` pixels, enlarged `scale` times without smoothing, with their words."""
    words = [plain_caption(s) for s in scenes] if captions is None else list(captions)
    cell, margin, line = size * scale, 8, 12
    lines = [wrap(text, max(8, cell // 6)) for text in words]
    text_height = line * max((len(x) for x in lines), default=1) + 4
    rows = -(-len(scenes) // columns)
    sheet = Image.new(
        "RGB",
        (columns * (cell + margin) + margin, rows * (cell + text_height + margin) + margin),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(render(scenes, size), lines, strict=True)):
        x = margin + (i % columns) * (cell + margin)
        y = margin + (i // columns) * (cell + text_height + margin)
        enlarged = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (x, y))
        for row, content in enumerate(text):
            draw.text((x, y + cell + 2 + row * line), content, fill="black")
    return sheet
