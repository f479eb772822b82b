"""Words for scenes, and scenes' requirements from words.

`caption` says a scene in one of many ways (either word order, optional sizes, floor, wall and
opening); `plain_caption` in the one canonical way; `parse` reads all of them back. Captions come
from the scene alone, so a mirrored scene's words are mirrored with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from safelight.data.stilllife.world import (
    COLOURS,
    FLOORS,
    SHAPES,
    WALLS,
    Arrangement,
    Scene,
    generator,
    scene,
)

_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_OPENINGS = ("", "a picture of", "a photo of", "an image of")
_FLOOR_NOUNS = ("floor", "table")
_FLOOR_PREPOSITIONS = ("on", "standing on")
_WALL_PREPOSITIONS = ("against", "with")
_WALL_NOUNS = ("wall", "background")

# Each arrangement's relations: said of (a, b) and, turned round, of (b, a). The first is canonical.
_FORWARD = {
    Arrangement.LEFT_RIGHT: ("to the left of", "left of", "on the left of", "on the left side of"),
    Arrangement.STACK: ("on top of", "on", "resting on", "stacked on", "above"),
    Arrangement.DEPTH: ("in front of", "before"),
}
_BACKWARD = {
    Arrangement.LEFT_RIGHT: (
        "to the right of",
        "right of",
        "on the right of",
        "on the right side of",
    ),
    Arrangement.STACK: ("under", "below", "beneath", "underneath"),
    Arrangement.DEPTH: ("behind", "at the back of"),
}
# "X with Y <suffix>": where the second thing is, as seen from the first. (forward: X is a.)
_WITH_FORWARD = {
    Arrangement.LEFT_RIGHT: ("to its right", "on its right"),
    Arrangement.STACK: ("under it", "below it"),
    Arrangement.DEPTH: ("behind it",),
}
_WITH_BACKWARD = {
    Arrangement.LEFT_RIGHT: ("to its left", "on its left"),
    Arrangement.STACK: ("on top", "on top of it"),
    Arrangement.DEPTH: ("in front of it", "in front"),
}


@dataclass(frozen=True, slots=True)
class WantedThing:
    """A thing as words ask for it; `size` is None where nothing is said."""

    colour: str
    shape: str
    size: str | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a caption asks for, in canonical form (see `world`); None is "not said"."""

    arrangement: Arrangement
    a: WantedThing
    b: WantedThing | None
    floor: str | None = None
    wall: str | None = None

    def fits(self, scene: Scene) -> bool:
        """Whether a scene is a right answer to the caption."""
        if self.arrangement != scene.arrangement:
            return False
        for mine, its in ((self.a, scene.a), (self.b, scene.b)):
            if (mine is None) != (its is None):
                return False
            if mine is None or its is None:
                continue
            if (mine.colour, mine.shape) != its.pair or mine.size not in (None, its.size):
                return False
        return self.floor in (None, scene.floor) and self.wall in (None, scene.wall)


def plain_caption(scene: Scene) -> str:
    """The canonical caption: "a red cube on top of a blue sphere"."""
    first = f"a {scene.a.colour} {scene.a.shape}".replace("a orange", "an orange")
    if scene.b is None:
        return first
    second = f"a {scene.b.colour} {scene.b.shape}".replace("a orange", "an orange")
    return f"{first} {_FORWARD[scene.arrangement][0]} {second}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the many natural ways to say a scene: at most 23 words, most of them 8 to 14.

    Every draw is made in every call, so a scene and its mirror image, given equal generators,
    are said in the same way with the side words exchanged.
    """
    r = rng.random(12).tolist()

    def pick(options: tuple[str, ...], roll: float) -> str:
        # Half of the time the first, the plain way to say it.
        roll = 0.0 if roll < 0.4 else (roll - 0.4) / 0.6
        return options[int(roll * len(options))]

    with_sizes = r[0] < 0.40
    article = "the" if r[1] < 0.08 else "" if r[1] < 0.20 else "a"
    names = []
    for thing, roll in zip(scene.things, (r[2], r[3]), strict=False):
        size = _SIZE_WORDS[thing.size][int(roll * 2)] if with_sizes else ""
        names.append(_noun_phrase(article, size, thing.colour, thing.shape))
    if scene.b is None:
        text = names[0]
    else:
        a, b = names
        k = scene.arrangement
        if r[4] < 0.88:
            text = f"{a} {pick(_FORWARD[k], r[6])} {b}"
            if r[5] < 0.5:
                text = f"{b} {pick(_BACKWARD[k], r[6])} {a}"
        elif r[5] < 0.5:
            text = f"{a} with {b} {pick(_WITH_FORWARD[k], r[6])}"
        else:
            text = f"{b} with {a} {pick(_WITH_BACKWARD[k], r[6])}"
    if r[8] < 0.35:
        preposition = pick(_FLOOR_PREPOSITIONS, r[8] / 0.35)
        text = f"{text} {preposition} a {scene.floor} {pick(_FLOOR_NOUNS, r[9])}"
    if r[10] < 0.20:
        preposition = pick(_WALL_PREPOSITIONS, r[10] / 0.20)
        text = f"{text} {preposition} a {scene.wall} {pick(_WALL_NOUNS, r[11])}"
    opening = pick(_OPENINGS, r[7])
    # Text encoders of this family read 32 tokens: a long sentence goes without its opening.
    return text if not opening or len(text.split()) > 17 else f"{opening} {text}"


def _noun_phrase(article: str, size: str, colour: str, shape: str) -> str:
    words = " ".join(word for word in (size, colour, shape) if word)
    if article == "a" and words.startswith("orange"):
        article = "an"
    return f"{article} {words}".strip()


# -- reading --------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _grammar() -> tuple[re.Pattern[str], dict[str, tuple[Arrangement, bool]], dict[str, str]]:
    relations: dict[str, tuple[Arrangement, bool]] = {}
    for forward, table in ((True, _FORWARD), (False, _BACKWARD)):
        for kind, phrases in table.items():
            relations |= dict.fromkeys(phrases, (kind, forward))
    for forward, table in ((True, _WITH_FORWARD), (False, _WITH_BACKWARD)):
        for kind, phrases in table.items():
            relations |= {f"with {phrase}": (kind, forward) for phrase in phrases}
    sizes = {word: size for size, words in _SIZE_WORDS.items() for word in words}

    def any_of(options: list[str] | tuple[str, ...]) -> str:
        return "|".join(sorted(options, key=len, reverse=True))

    def thing(n: int) -> str:
        return (
            rf"(?:(?:a|an|the|one) )?(?:(?P<size{n}>{any_of(list(sizes))}) )?"
            rf"(?P<colour{n}>{any_of(COLOURS)}) (?P<shape{n}>{any_of(SHAPES)})"
        )

    between = any_of([p for p in relations if not p.startswith("with ")])
    after = any_of([p[5:] for p in relations if p.startswith("with ")])
    pattern = (
        rf"(?:(?:a |an |the )?(?:picture|photo|image|photograph|painting|drawing|render) of )?"
        rf"{thing(1)}"
        rf"(?: (?:is |sits |stands )?(?:(?P<relation>{between}) {thing(2)}"
        rf"|(?:with|and) {thing(3)} (?P<suffix>{after})))?"
        rf"(?: (?:{any_of(_FLOOR_PREPOSITIONS)}) (?:a |the )?(?P<floor>{any_of(FLOORS)})"
        rf" (?:{any_of((*_FLOOR_NOUNS, 'ground', 'tabletop'))}))?"
        rf"(?: (?:{any_of(_WALL_PREPOSITIONS)}) (?:a |the )?(?P<wall>{any_of(WALLS)})"
        rf" (?:{any_of((*_WALL_NOUNS, 'backdrop'))}))?"
    )
    return re.compile(pattern), relations, sizes


def parse(caption: str) -> Wanted | None:
    """What a caption asks for; None when it is not a sentence of this world."""
    pattern, relations, sizes = _grammar()
    words = re.findall(r"[a-z]+", caption.lower())
    match = pattern.fullmatch(" ".join(words))
    if match is None:
        return None
    found = match.groupdict()

    def thing(n: int) -> WantedThing | None:
        if found[f"shape{n}"] is None:
            return None
        size = found[f"size{n}"]
        return WantedThing(
            found[f"colour{n}"], found[f"shape{n}"], sizes[size] if size is not None else None
        )

    a, b = thing(1), thing(2) or thing(3)
    assert a is not None
    arrangement = Arrangement.SINGLE
    if b is not None:
        key = found["relation"] or f"with {found['suffix']}"
        arrangement, forward = relations[key]
        if not forward:
            a, b = b, a
    return Wanted(arrangement, a, b, found["floor"], found["wall"])


@lru_cache(maxsize=1)
def vocabulary() -> frozenset[str]:
    """Every word that `caption` can use (lower case)."""
    phrases = [*_OPENINGS, *_FLOOR_PREPOSITIONS, *_WALL_PREPOSITIONS, "a", "an", "the", "with"]
    for table in (_FORWARD, _BACKWARD, _WITH_FORWARD, _WITH_BACKWARD):
        phrases += [phrase for options in table.values() for phrase in options]
    phrases += [word for options in _SIZE_WORDS.values() for word in options]
    phrases += [*_FLOOR_NOUNS, *_WALL_NOUNS, *COLOURS, *SHAPES, *FLOORS, *WALLS]
    return frozenset(word for phrase in phrases for word in phrase.split())


def unknown_words(text: str) -> list[str]:
    """The words of a prompt that this world has never heard, in their order, each once."""
    known = vocabulary()
    return list(dict.fromkeys(w for w in re.findall(r"[a-z]+", text.lower()) if w not in known))


def all_captions_corpus(n: int, seed: int = 0) -> list[str]:
    """`n` captions of the whole world's scenes: the text from which BPE merges are learnt."""
    return [caption(scene(seed, i, "all"), generator(seed, i, 201)) for i in range(n)]
