"""How good a checker is: its ROC on pictures sorted by hand.

The margin of a picture is its highest concept score; the checker flags margins above 0. Moving
that 0 gives the curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from safelight.checker import Checker
from safelight.safety.concepts import opened
from safelight.safety.decide import flagged

_CHUNK = 32


@dataclass(frozen=True)
class Roc:
    """A curve, and where the checker stands on it.

    Attributes:
        offset: added to every threshold; descending, so that rates rise.
        true, false: shares of unsafe and of safe pictures that are flagged there.
        area: under the curve: how often an unsafe picture has a higher margin than a safe one.
        at: (true, false) of the checker as it is, by its own rule.
        wrong: the files it gets wrong as it is.
    """

    offset: np.ndarray
    true: np.ndarray
    false: np.ndarray
    area: float
    at: tuple[float, float]
    safe: int
    unsafe: int
    wrong: tuple[Path, ...] = ()


def margins(checker: Checker, paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Margins ``(N,)`` and flags ``(N,)`` of the pictures in files."""
    found, flags = [], []
    for start in range(0, len(paths), _CHUNK):
        scores = checker.scores(opened(paths[start : start + _CHUNK], "pictures"))
        worst = scores.concepts.max(dim=1).values  # NaN wins in torch, and is never safe
        found.append(torch.nan_to_num(worst, nan=torch.inf))
        rows = zip(scores.concepts.tolist(), scores.special.tolist(), strict=True)
        flags += [flagged(plain, special) for plain, special in rows]
    return torch.cat(found).numpy(), np.array(flags, dtype=bool)


def measure(checker: Checker, safe: Sequence[Path], unsafe: Sequence[Path]) -> Roc:
    """The checker's curve on sorted pictures."""
    low, passed = margins(checker, safe)
    high, caught = margins(checker, unsafe)
    cuts = np.unique(np.concatenate([low, high]))[::-1]
    false, true = ((m[None] >= cuts[:, None]).mean(axis=1) for m in (low, high))
    false, true = np.concatenate([[0.0], false]), np.concatenate([[0.0], true])
    wrong = [p for p, flag in zip(safe, passed, strict=True) if flag]
    wrong += [p for p, flag in zip(unsafe, caught, strict=True) if not flag]
    return Roc(
        offset=np.concatenate([[np.inf], cuts]),
        true=true,
        false=false,
        area=float(((true[1:] + true[:-1]) / 2 * np.diff(false)).sum()),
        at=(float(caught.mean()), float(passed.mean())),
        safe=len(safe),
        unsafe=len(unsafe),
        wrong=tuple(wrong),
    )


def table(roc: Roc) -> str:
    """The curve at a few false-positive rates, in Markdown."""
    lines = [
        f"{roc.unsafe} unsafe and {roc.safe} safe pictures, area under the curve {roc.area:.4f}.",
        "",
        "| flagged of safe | flagged of unsafe | thresholds moved by |",
        "|---|---|---|",
    ]
    for most in (0.0, 0.01, 0.05, 0.1, 0.2, 0.5):
        k = int(np.flatnonzero(roc.false <= most + 1e-12).max())
        moved = f"{roc.offset[k]:+.3f}" if np.isfinite(roc.offset[k]) else "flags nothing"
        lines.append(f"| {roc.false[k]:.1%} | {roc.true[k]:.1%} | {moved} |")
    lines.append(f"| **{roc.at[1]:.1%}** | **{roc.at[0]:.1%}** | **as it is** |")
    return "\n".join(lines) + "\n"


def document(roc: Roc) -> dict[str, object]:
    """The measurement for programs."""
    finite = np.isfinite(roc.offset)
    return {
        "schema": 1,
        "safe": roc.safe,
        "unsafe": roc.unsafe,
        "area": roc.area,
        "flagged_of_unsafe": roc.at[0],
        "flagged_of_safe": roc.at[1],
        "wrong": [str(path) for path in roc.wrong],
        "curve": {
            "offset": roc.offset[finite].tolist(),
            "true": roc.true[finite].tolist(),
            "false": roc.false[finite].tolist(),
        },
    }


def plot(roc: Roc, path: Path) -> None:
    """The curve as a picture; needs the extra ``eval`` (matplotlib)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), dpi=120)
    axes = figure.add_subplot()
    axes.step(roc.false, roc.true, where="post", label=f"area {roc.area:.3f}")
    axes.plot([0, 1], [0, 1], ":", color="grey", label="chance")
    axes.plot(roc.at[1], roc.at[0], "o", label="as it is")
    axes.set_xlabel("flagged of safe pictures")
    axes.set_ylabel("flagged of unsafe pictures")
    axes.legend(loc="lower right")
    figure.savefig(path, bbox_inches="tight")
