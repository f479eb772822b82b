"""Scores of a generator over the fixed prompt lists, beside the ceilings of what measures it.

A generator is any function from prompts and seeds to pictures. Its pictures are read by the judge
and by the hue check; so are real renders of the same scenes, and their reconstructions by the
autoencoder, because neither reader is perfect and no decoded picture can be better than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from safelight.data import stilllife
from safelight.data.attributes import wanted_classes
from safelight.data.stilllife import Arrangement, Wanted
from safelight.evaluate import segment
from safelight.evaluate.frechet import frechet_distance, statistics
from safelight.evaluate.judge import Judge
from safelight.evaluate.prompts import Prompt

Generate = Callable[[Sequence[str], Sequence[int]], np.ndarray]
"""Prompts and seeds to uint8 ``(N, H, W, 3)``."""

REFERENCE_SERIES = 70_100
"""Scenes of the Fréchet distance's reference set: this series, of the list's own split."""

_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Share:
    """``right`` of ``total``, with Wilson's 95 % interval (Wilson 1927; it stays in 0..1)."""

    right: int
    total: int

    @property
    def value(self) -> float:
        """The share; NaN of nothing."""
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % interval."""
        if not self.total:
            return 0.0, 1.0
        n, p, z2 = self.total, self.value, _Z95**2
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    @classmethod
    def of(cls, flags: np.ndarray) -> Share:
        """The share of True."""
        return cls(int(np.count_nonzero(flags)), len(flags))

    def __str__(self) -> str:
        if not self.total:
            return "—"
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.1f}–{100 * high:.1f})"


@dataclass(frozen=True)
class Reading:
    """What the judge and the hue check say of a set of pictures.

    ``cells`` by name: ``all`` (everything right), ``left_right stack depth single`` (everything
    right, by wanted arrangement), ``relation`` (the arrangement alone), ``shapes`` and
    ``colours`` (of both things), ``swapped`` (left/right prompts of two colours that came out
    exchanged), ``hue`` (the hue check agrees on colours and relation) and ``hue_colours``.
    """

    cells: Mapping[str, Share]
    right: np.ndarray
    """bool ``(N,)``: everything right."""
    said: np.ndarray
    """int64 ``(N, 5)``: the judge's classes."""


@dataclass
class ListScore:
    """The scores of one prompt list; ``real`` and ``decoded`` are the ceilings."""

    name: str
    prompts: list[Prompt]
    generated: Reading
    real: Reading | None = None
    decoded: Reading | None = None
    frechet: dict[str, float] = field(default_factory=dict)
    """Squared distance to the reference renders: of ``generated``, of ``decoded``, of ``real``
    (other renders: the floor that a finite sample leaves), and ``ratio``, first by second."""
    failures: list[tuple[np.ndarray, Prompt, np.ndarray]] = field(default_factory=list)
    """Up to 64 pictures that are wrong, with their prompts and what the judge said."""
    first: list[np.ndarray] = field(default_factory=list)
    """The first 64 pictures, unselected."""


def wanted_of(prompts: Sequence[Prompt]) -> list[Wanted]:
    """What the prompts' words ask for."""
    found = [stilllife.parse(p.text) for p in prompts]
    for prompt, wanted in zip(prompts, found, strict=True):
        if wanted is None:
            raise ValueError(f"not a sentence of still life: {prompt.text!r}")
    return [w for w in found if w is not None]


def read(pictures: np.ndarray, wanted: Sequence[Wanted], judge: Judge) -> Reading:
    """Read pictures, uint8 ``(N, H, W, 3)``, against what their prompts want."""
    said, hue = judge.classes(pictures), segment.check(pictures, wanted)
    return tally(said, wanted_classes(wanted), hue)


def tally(said: np.ndarray, want: np.ndarray, hue: segment.Check) -> Reading:
    """The cells, from the judge's classes and the wanted ones, int64 ``(N, 5)`` each."""
    same = said == want
    right, kind = same.all(1), want[:, 0]
    two = kind != Arrangement.SINGLE
    beside = (kind == Arrangement.LEFT_RIGHT) & (want[:, 2] != want[:, 4])
    exchanged = (said[:, 2] == want[:, 4]) & (said[:, 4] == want[:, 2])
    cells = {
        "all": Share.of(right),
        **{a.name.lower(): Share.of(right[kind == a]) for a in Arrangement},
        "relation": Share.of(same[two, 0]),
        "shapes": Share.of(same[two][:, [1, 3]].all(1)),
        "colours": Share.of(same[two][:, [2, 4]].all(1)),
        "swapped": Share.of(exchanged[beside]),
        "hue": Share.of(hue.agrees),
        "hue_colours": Share.of(hue.colours),
    }
    return Reading(cells, right, said)


def score_list(
    name: str,
    prompts: Sequence[Prompt],
    generate: Generate,
    judge: Judge,
    *,
    autoencode: Callable[[np.ndarray], np.ndarray] | None = None,
    features: Callable[[np.ndarray], np.ndarray] | None = None,
    ceilings: bool = True,
    batch: int = 50,
    progress: Callable[[str, int, int], None] | None = None,
) -> ListScore:
    """Generate a list's pictures and score them.

    Args:
        autoencode: pictures there and back through the model's autoencoder, for the ceiling.
        features: of a network that the judge does not share, for the Fréchet distances.
        ceilings: also read real renders of the prompts' scenes, and their reconstructions.
        batch: pictures a call.
        progress: called with the stage's name, pictures done, pictures in all.
    """
    prompts, wanted = list(prompts), wanted_of(prompts)
    if not prompts:
        raise ValueError(f"no prompts in {name}")
    parts = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        parts.append(generate([p.text for p in part], [p.seed for p in part]))
        if len(parts[-1]) != len(part):
            raise ValueError(f"{len(part)} prompts gave {len(parts[-1])} pictures")
        if progress is not None:
            progress(f"{name}: pictures", start + len(part), len(prompts))
    made = np.concatenate(parts)
    result = ListScore(name, prompts, read(made, wanted, judge), first=list(made[:64]))
    wrong = np.flatnonzero(~result.generated.right)[:64]
    result.failures = [(made[i], prompts[i], result.generated.said[i]) for i in wrong]
    if not ceilings:
        return result
    real = np.concatenate(list(renders([p.scene() for p in prompts], made.shape[1])))
    result.real = read(real, wanted, judge)
    sets = {"generated": made, "real": real}
    if autoencode is not None:
        sets["decoded"] = np.concatenate(
            [autoencode(real[i : i + batch]) for i in range(0, len(real), batch)]
        )
        result.decoded = read(sets["decoded"], wanted, judge)
    if features is not None:
        result.frechet = frechet(sets, reference_renders(prompts, made.shape[1]), features)
    return result


def frechet(
    sets: Mapping[str, np.ndarray],
    reference: Iterator[np.ndarray],
    features: Callable[[np.ndarray], np.ndarray],
) -> dict[str, float]:
    """Squared distances of each set to the reference; ``ratio`` is generated by decoded."""
    base = statistics(reference, features)
    found = {
        name: frechet_distance(statistics([pictures], features), base)
        for name, pictures in sets.items()
    }
    if "decoded" in found:
        found["ratio"] = found["generated"] / found["decoded"]
    return found


def reference_renders(prompts: Sequence[Prompt], size: int) -> Iterator[np.ndarray]:
    """Fresh renders, four for each prompt, of the prompts' splits and arrangements."""
    need: dict[tuple[stilllife.Split, Arrangement], int] = {}
    for prompt in prompts:
        key = (prompt.split, prompt.scene().arrangement)
        need[key] = need.get(key, 0) + 4
    splits: list[stilllife.Split] = list(dict.fromkeys(split for split, _ in need))
    for split in splits:
        left = {a: n for (s, a), n in need.items() if s == split}
        found, index = [], 0
        while any(left.values()):
            scene = stilllife.scene(REFERENCE_SERIES, index, split)
            index += 1
            if left.get(scene.arrangement, 0):
                left[scene.arrangement] -= 1
                found.append(scene)
        yield from renders(found, size)


def renders(scenes: Sequence[stilllife.Scene], size: int) -> Iterator[np.ndarray]:
    """Renders of scenes, in parts, uint8 ``(N, size, size, 3)``."""
    for start in range(0, len(scenes), 256):
        yield stilllife.render(scenes[start : start + 256], size)
