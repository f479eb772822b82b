"""Biases and limits as labelled sheets, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from safelight.data.sheet import picture_sheet
from safelight.evaluate.limits import Row, Section
from safelight.store.pictures import save

SCHEMA = 1
Drawn = Sequence[tuple[Section, Sequence[Row]]]


def sheet(rows: Sequence[Row], *, size: int = 160) -> Image.Image:
    """A row for each case: its label and prompt, then the seeds."""
    pictures: list[Image.Image | None] = []
    words: list[str] = []
    for row in rows:
        pictures += row.pictures
        for i, seed in enumerate(row.seeds):
            told = f"{row.case.label}: {_latin(row.case.prompt)}" if i == 0 else f"seed {seed}"
            if row.flagged[i]:
                told += " (flagged)"
            elif row.pictures[i] is None:
                told += " (no picture)"
            words.append(told)
    columns = max(len(row.pictures) for row in rows)
    return picture_sheet(pictures, words, size=size, columns=columns)


def _latin(text: str) -> str:
    """The sheet's font draws Latin only: the label must do for other scripts."""
    try:
        return text.encode("latin-1").decode("latin-1")
    except UnicodeEncodeError:
        return "…"


def markdown(drawn: Drawn, clip: str | None) -> str:
    """What the card says, the sheet, and the counts, section by section."""
    blocks = []
    for section, rows in drawn:
        block = [f"## {section.title}", ""]
        if section.card:
            block += [f"> {section.card}", ""]
        block += [f"![{section.title}]({section.name}.png)", ""]
        blocks.append("\n".join(block + _table(section, rows)))
    told = (
        f"Counts are guesses of {clip}, which has biases of its own: look at the sheets."
        if clip
        else "No CLIP was given: sheets alone."
    )
    return "\n\n".join([*(b.rstrip() for b in blocks), told]) + "\n"


def _table(section: Section, rows: Sequence[Row]) -> list[str]:
    heads = ["", "prompt", "pictures"]
    heads += [q.name for q in section.questions]
    right = any(row.right is not None for row in rows)
    score = any(row.score is not None for row in rows)
    heads += ["nearest to its prompt (95 %)"] if right else []
    heads += ["CLIP score (95 %)", "against English (95 %)"] if score else []
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        flagged = sum(row.flagged)
        cells = [row.case.label, row.case.prompt.replace("|", "\\|")]
        cells.append(f"{len(row.seen)}" + (f", {flagged} flagged" if flagged else ""))
        for question in section.questions:
            said = row.answers.get(question.name, {})
            cells.append(", ".join(f"{name} {n}" for name, n in said.items()) or "—")
        cells += [str(row.right or "—")] if right else []
        cells += [str(row.score or "—"), str(row.less or "—")] if score else []
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def as_json(drawn: Drawn, clip: str | None, **settings: Any) -> dict[str, Any]:
    """All counts, with the settings."""
    return {
        "schema": SCHEMA,
        "settings": {"clip": clip, **settings},
        "sections": {
            section.name: [
                {
                    "label": row.case.label,
                    "prompt": row.case.prompt,
                    "pictures": len(row.seen),
                    "flagged": sum(row.flagged),
                    "answers": row.answers,
                    "right": None
                    if row.right is None
                    else {
                        "right": row.right.right,
                        "total": row.right.total,
                        "wilson95": [round(v, 5) for v in row.right.interval],
                    },
                    "clip_score": row.score and row.score.model_dump(),
                    "against_english": row.less and row.less.model_dump(),
                }
                for row in rows
            ]
            for section, rows in drawn
        },
    }


def write(folder: Path, drawn: Drawn, clip: str | None, **settings: Any) -> None:
    """``limits.md``, ``limits.json``, and a sheet a section."""
    folder.mkdir(parents=True, exist_ok=True)
    for section, rows in drawn:
        save(folder / f"{section.name}.png", sheet(rows))
    (folder / "limits.md").write_text(markdown(drawn, clip), encoding="utf-8")
    text = json.dumps(as_json(drawn, clip, **settings), indent=1, ensure_ascii=False) + "\n"
    (folder / "limits.json").write_text(text, encoding="utf-8")
