"""Scores as a JSON file, a markdown table and contact sheets."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from safelight.evaluate.judge import describe
from safelight.evaluate.score import ListScore, Reading
from safelight.store.pictures import save

SCHEMA = 1
"""Number of the JSON's schema."""

ROWS = {
    "all": "everything right",
    "left_right": "left/right: everything right",
    "stack": "stack: everything right",
    "depth": "front/behind: everything right",
    "single": "single: everything right",
    "relation": "relation",
    "shapes": "both shapes",
    "colours": "both colours",
    "swapped": "colours swapped (left/right)",
    "hue": "hue check agrees",
    "hue_colours": "hue check: colours",
}


def as_json(scores: Sequence[ListScore], **settings: Any) -> dict[str, Any]:
    """All numbers, with the settings that they were measured under; ``each`` is one digit a prompt,
    1 where everything is right."""
    return {
        "schema": SCHEMA,
        "settings": settings,
        "lists": {
            s.name: {
                "prompts": len(s.prompts),
                "each": "".join("01"[int(right)] for right in s.generated.right),
                "generated": cells(s.generated),
                "decoded": cells(s.decoded),
                "real": cells(s.real),
                "frechet": {k: round(v, 5) for k, v in s.frechet.items()},
            }
            for s in scores
        },
    }


def cells(it: Reading | None) -> dict[str, Any] | None:
    """A reading's shares, with their intervals."""
    if it is None:
        return None
    return {
        name: {
            "right": cell.right,
            "total": cell.total,
            "share": round(cell.value, 5) if cell.total else None,
            "wilson95": [round(v, 5) for v in cell.interval],
        }
        for name, cell in it.cells.items()
    }


def markdown(scores: Sequence[ListScore]) -> str:
    """A table a list: generated beside both ceilings, with 95 % intervals in brackets."""
    blocks = []
    for s in scores:
        lines = [
            f"**{s.name}**, {len(s.prompts)} prompts",
            "",
            "| | generated | VAE reconstructions | real renders |",
            "|---|---|---|---|",
        ]
        for cell, words in ROWS.items():
            if not s.generated.cells[cell].total:
                continue
            ceilings = [r.cells[cell] if r is not None else "—" for r in (s.decoded, s.real)]
            lines.append(f"| {words} | {s.generated.cells[cell]} | {ceilings[0]} | {ceilings[1]} |")
        if s.frechet:
            made, decoded, real = (
                f"{s.frechet[k]:.4g}" if k in s.frechet else "—"
                for k in ("generated", "decoded", "real")
            )
            lines.append(f"| Fréchet distance to renders | {made} | {decoded} | {real} |")
        ratio = s.frechet.get("ratio", math.nan)
        if not math.isnan(ratio):
            lines += ["", f"Fréchet distance, generated to reconstructions: {ratio:.2f}x."]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def sheet(
    pictures: Sequence[np.ndarray],
    words: Sequence[str] | None = None,
    *,
    columns: int = 8,
    cell: int = 128,
) -> Image.Image:
    """Pictures in rows, enlarged by whole pixels to about ``cell``, each above its words."""
    scale = max(1, cell // pictures[0].shape[0]) if len(pictures) else 1
    side = pictures[0].shape[0] * scale if len(pictures) else cell
    lines = [wrap(text, max(8, side // 6)) for text in words or []]
    text = 12 * max((len(x) for x in lines), default=0)
    rows = -(-len(pictures) // columns)
    out = Image.new(
        "RGB", (columns * (side + 4) + 4, max(1, rows * (side + text + 4) + 4)), "white"
    )
    draw = ImageDraw.Draw(out)
    for i, picture in enumerate(pictures):
        x, y = 4 + (i % columns) * (side + 4), 4 + (i // columns) * (side + text + 4)
        image = Image.fromarray(picture)
        out.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        for row, line in enumerate(lines[i] if lines else []):
            draw.text((x, y + side + 12 * row), line, fill="black")
    return out


def write(folder: Path, scores: Sequence[ListScore], **settings: Any) -> None:
    """Write ``scores.json``, ``scores.md``, and two sheets a list: unselected, and failures."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(scores, **settings), indent=1) + "\n"
    (folder / "scores.json").write_text(text)
    (folder / "scores.md").write_text(markdown(scores))
    for s in scores:
        save(folder / f"{s.name}.png", sheet(s.first))
        if s.failures:
            pictures, prompts, said = zip(*s.failures, strict=True)
            words = [f"{p.text} → {describe(c)}" for p, c in zip(prompts, said, strict=True)]
            save(folder / f"{s.name}-failures.png", sheet(pictures, words))
