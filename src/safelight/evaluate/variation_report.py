"""What variations keep, as Markdown, JSON and a sheet of pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safelight.data.sheet import picture_sheet
from safelight.evaluate.report import ROWS, cells
from safelight.evaluate.variation import Kept
from safelight.store.pictures import save

SCHEMA = 1


def markdown(rows: Sequence[Kept]) -> str:
    """A table of fidelity, and one of the judge's findings a list."""
    lines = ["| inputs | noise level | pictures | CLIP cosine (95 %) |", "|" + "---|" * 4]
    for row in rows:
        level = "—" if row.noise_level is None else str(row.noise_level)
        lines.append(f"| {row.name} | {level} | {row.fidelity.pictures} | {row.fidelity} |")
    blocks = ["\n".join(lines)]
    for row in rows:
        if row.outputs is None or row.inputs is None:
            continue
        level = "" if row.noise_level is None else f", noise level {row.noise_level}"
        part = [f"**{row.name}**{level}", "", "| kept | outputs | inputs |", "|---|---|---|"]
        for cell, words in ROWS.items():
            if row.outputs.cells[cell].total:
                part.append(f"| {words} | {row.outputs.cells[cell]} | {row.inputs.cells[cell]} |")
        blocks.append("\n".join(part))
    if rows:
        blocks.append(f"Cosines in {rows[0].fidelity.features}.")
    return "\n\n".join(blocks) + "\n"


def as_json(rows: Sequence[Kept], **settings: Any) -> dict[str, Any]:
    """All numbers, with the settings that they were measured under."""
    return {
        "schema": SCHEMA,
        "settings": settings,
        "inputs": [
            {
                "name": row.name,
                "noise_level": row.noise_level,
                "fidelity": row.fidelity.model_dump(),
                "outputs": cells(row.outputs),
                "inputs": cells(row.inputs),
            }
            for row in rows
        ],
    }


def write(folder: Path, rows: Sequence[Kept], **settings: Any) -> None:
    """``variations.json``, ``variations.md`` and a sheet a row: inputs beside their outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(rows, **settings), indent=1) + "\n"
    (folder / "variations.json").write_text(text)
    (folder / "variations.md").write_text(markdown(rows), encoding="utf-8")
    for row in rows:
        level = "" if row.noise_level is None else f"-noise-{row.noise_level}"
        pictures = [p for pair in row.shown for p in pair]
        words = ["input", "output"] * len(row.shown)
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(row.name).name)
        save(folder / f"{name}{level}.png", picture_sheet(pictures, words, size=128, columns=8))
