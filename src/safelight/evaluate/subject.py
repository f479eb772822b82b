"""Whether a personalised tiny model shows its subject, and still knows the rest.

The subject is the curio of :mod:`safelight.data.stilllife.curio`, a cone banded in red and white.
Every number stands between two that bound it: the model before (what it does without knowing the
subject), and real renders of the same scenes with the curio in them (all that can be asked for).

- ``banded``: pictures with at least three changes between red and white down some column. The
  world's own scenes have none; it takes no network's word.
- ``likeness``: the mean cosine of CLIP embeddings with those of the training pictures (CLIP-I of
  Ruiz et al. 2023, 2208.12242, section 4.1).
- ``obeyed``: the judge sees a cone first, and the other thing, its colour and the arrangement as
  the prompt says.
- ``class_right``: plain prompts of the class (``a red cone``) of which the judge says that all is
  right; what it falls by is the class's drift. ``class_banded``: of those, how many show bands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from safelight.data import stilllife
from safelight.data.attributes import wanted_classes
from safelight.data.stilllife import Arrangement
from safelight.evaluate.judge import Judge
from safelight.evaluate.score import Generate, Share

Embed = Callable[[np.ndarray], np.ndarray]
"""Pictures to embeddings of unit length ``(N, D)``."""

SUBJECT = "sks cone"
OTHERS = (
    ("blue", "cube"),
    ("green", "cylinder"),
    ("yellow", "sphere"),
    ("purple", "torus"),
)
_SAID = {
    Arrangement.LEFT_RIGHT: "to the left of",
    Arrangement.STACK: "on top of",
    Arrangement.DEPTH: "in front of",
}


def held_out() -> list[tuple[str, tuple[str, str], Arrangement]]:
    """Prompts of scenes that no training picture shows: each with the other thing in it."""
    return [
        (f"a {SUBJECT} {said} a {' '.join(other)}", other, kind)
        for kind, said in _SAID.items()
        for other in OTHERS
    ]


def class_prompts() -> list[str]:
    """The class's own: a cone in every colour that the world has it in."""
    named = [c for c in stilllife.COLOURS if (c, "cone") not in stilllife.UNSEEN_PAIRS]
    return [f"a{'n' * (c == 'orange')} {c} cone" for c in named]


def bands(picture: np.ndarray) -> int:
    """Most changes between red and white down a column of a picture ``(H, W, 3)``."""
    rgb = picture.astype(int)
    low, high = rgb.min(axis=2), rgb.max(axis=2)
    red = (rgb[..., 0] > 110) & (rgb[..., 0] > 2 * np.maximum(rgb[..., 1], rgb[..., 2]))
    white = (low > 105) & (high - low < 0.16 * high)
    kind = np.where(red, 1, np.where(white, 2, 0))
    most = 0
    for column in kind.T:
        edges = np.flatnonzero(np.diff(column)) + 1
        runs = [(part[0], len(part)) for part in np.split(column, edges)]
        # Between two bands lies at most a blurred pixel or three; a band is two pixels or more.
        last, gap, changes = 0, 0, 0
        for value, length in runs:
            if value == 0 or length < 2:
                gap += length
                continue
            if last and value != last and gap <= 3:
                changes += 1
            elif last and gap > 3:
                changes = 0
            last, gap = value, 0
            most = max(most, changes)
    return most


def banded(pictures: np.ndarray) -> np.ndarray:
    """bool ``(N,)``: which show a banded thing, of red and white."""
    return np.array([bands(picture) >= 3 for picture in pictures])


def measure(
    generate: Generate,
    known: np.ndarray,
    embed: Embed,
    judge: Judge,
    *,
    each: int = 8,
) -> dict[str, float]:
    """The numbers of the file's head, for a model.

    Args:
        generate: the model.
        known: the training pictures, uint8 ``(N, H, W, 3)``.
        each: pictures a prompt; seeds 0 to ``each - 1``.
    """
    scenes = [scene for scene in held_out() for _ in range(each)]
    seeds = list(range(each)) * len(held_out())
    new = generate([prompt for prompt, _, _ in scenes], seeds)
    plain = [prompt for prompt in class_prompts() for _ in range(each)]
    of_class = generate(plain, list(range(each)) * len(class_prompts()))
    wanted = wanted_classes([w for w in map(stilllife.parse, plain) if w is not None])
    right = (judge.classes(of_class) == wanted).all(axis=1)
    return {
        **_of_subject(new, [(other, kind) for _, other, kind in scenes], known, embed, judge),
        "class_right": Share.of(right).value,
        "class_banded": Share.of(banded(of_class)).value,
    }


def ceiling(known: np.ndarray, embed: Embed, judge: Judge, *, each: int = 8) -> dict[str, float]:
    """The same of real renders with the curio in them."""
    scenes = [(other, kind) for _, other, kind in held_out() for _ in range(each)]
    drawn = [stilllife.curio_scene(1, k, other, kind) for k, (other, kind) in enumerate(scenes)]
    return _of_subject(stilllife.render_curios(drawn, known.shape[1]), scenes, known, embed, judge)


def _of_subject(
    pictures: np.ndarray,
    scenes: Sequence[tuple[tuple[str, str], Arrangement]],
    known: np.ndarray,
    embed: Embed,
    judge: Judge,
) -> dict[str, float]:
    said = judge.classes(pictures)
    wanted = np.array(
        [
            (int(kind), stilllife.SHAPES.index("cone"), stilllife.SHAPES.index(shape),
             stilllife.COLOURS.index(colour))
            for (colour, shape), kind in scenes
        ]
    )  # fmt: skip
    return {
        "banded": Share.of(banded(pictures)).value,
        "likeness": float((embed(pictures) @ embed(known).T).mean()),
        "obeyed": Share.of((said[:, [0, 1, 3, 4]] == wanted).all(axis=1)).value,
    }
