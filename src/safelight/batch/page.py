"""What a run made, for people: a page of pictures, and the manifest as CSV."""

from __future__ import annotations

import csv
import html
import io
from pathlib import Path
from typing import Any

from safelight.batch import ledger
from safelight.batch.ledger import Record

ROWS = 500
"""Rows of one page; more make index-2.html and so on."""

_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2rem; background: #fafafa; color: #222 }
nav a { margin-right: .6rem }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem }
figure { margin: 0; padding: .5rem; background: #fff; border: 1px solid #ddd; overflow: hidden }
img { width: 100%; height: auto; display: block }
figcaption { margin-top: .4rem; overflow-wrap: anywhere }
small { color: #666 } .failed, .partial { border-color: #c33 } .flagged { border-color: #d90 }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd }
figure { background: #222; border-color: #444 } a { color: #8bf } small { color: #999 } }
"""


class Page:
    """``index.html``, written a page at a time; a page is in its place when it is complete."""

    def __init__(self, folder: Path, *, title: str) -> None:
        self.folder, self.title = folder, title
        self._parts: list[str] = []
        self._count = self._pages = 0

    def add(self, record: Record) -> None:
        """One more row."""
        if self._count == ROWS:
            self._write(last=False)
        self._parts.append(_row(record))
        self._count += 1

    def close(self) -> Path:
        """The last page; the path of the first."""
        self._write(last=True)
        return self.folder / _name(1)

    def _write(self, *, last: bool) -> None:
        self._pages += 1
        links = []
        if self._pages > 1:
            links.append(f'<a href="{_name(self._pages - 1)}">before</a>')
        if not last:
            links.append(f'<a href="{_name(self._pages + 1)}">next</a>')
        title = html.escape(f"{self.title}, page {self._pages}" if links else self.title)
        text = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            f"<style>{_STYLE}</style><h1>{title}</h1><nav>{''.join(links)}</nav>"
            f"<main>{''.join(self._parts)}</main></html>\n"
        )
        ledger.write(self.folder / _name(self._pages), text.encode("utf-8", "replace"))
        self._parts, self._count = [], 0


def _name(page: int) -> str:
    return "index.html" if page == 1 else f"index-{page}.html"


def _row(record: Record) -> str:
    status = html.escape(record["status"])
    words = html.escape(record.get("prompt") or "")
    if not record["files"]:
        problem = html.escape(_problem(record))
        return (
            f'<figure class="{status}"><figcaption>{words}<br><small>row {record["row"]}, '
            f"{html.escape(record['line'])}: {status}. {problem}</small></figcaption></figure>"
        )
    return "".join(
        f'<figure class="{status}"><a href="{html.escape(name)}"><img loading="lazy" '
        f'src="{html.escape(name)}" alt="{words}"></a><figcaption>{words}<br>'
        f"<small>row {record['row']}, {status}</small></figcaption></figure>"
        for name in record["files"]
    )


def _problem(record: Record) -> str:
    error = record.get("error") or {}
    parts = (error.get("field"), error.get("problem"), error.get("fix"))
    return " ".join(part for part in parts if part) or "; ".join(record.get("messages", ()))


class Sheet:
    """``manifest.csv``: the manifest for spreadsheets, one line a row."""

    COLUMNS = ("row", "line", "status", "model", "prompt", "files", "seeds", "seconds", "error")

    def __init__(self, folder: Path) -> None:
        self._path = folder / "manifest.csv"
        self._text = io.StringIO(newline="")
        self._writer = csv.writer(self._text)
        self._writer.writerow(self.COLUMNS)

    def add(self, record: Record) -> None:
        """One more row."""
        told: dict[str, Any] = {**record, "error": _problem(record)}
        told |= {name: " ".join(map(str, record[name])) for name in ("files", "seeds")}
        self._writer.writerow(told.get(name, "") for name in self.COLUMNS)

    def close(self) -> None:
        """Write it."""
        ledger.write(self._path, self._text.getvalue().encode("utf-8", "replace"))
