"""The fixed lists of prompts and seeds that every score is measured on.

The lists are files beside this module, committed before the first score and checked against the
digests below on every load. They are a function of still life alone::

    python -m safelight.evaluate.prompts            # verify
    python -m safelight.evaluate.prompts --write    # make them again; the digests must not change

``tuning`` is for choices (guidance, checkpoints); the others are for reports only. It shares no
seed, no scene and no two-object combination with them. ``paired`` is held out too, and long enough
to tell two models apart that differ by a point or two.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

from safelight.data import stilllife
from safelight.data.stilllife import Arrangement, Scene, Split
from safelight.errors import WeightsError

DIGESTS = {
    "seen": "3f5250526a01e750d1910d78c69c2fea4fa0e8c7ec59bbb754b023a4990ad53f",
    "held_out": "8f66b9434aae65f47ee294acac1c708f25a056789d618923e3eb39a987f4e55c",
    "single": "92a2fc53df533b854bb50d465288df6d0f849c34775ce0bf8b9952855fda496d",
    "pair": "9095eddada196ec65660a4e6a9d757df2b2f2dfd75c8bddfd6f3fb8d78814e1c",
    "tuning": "eb4c82509143926f50698b29f687ffd0653d0d168009de916e4268045d70136b",
    "paired": "0b70c419e147acf6d0f265b9cc00092a2b1c0e4125a3e9c83c53dae1fafd3b82",
}
"""SHA-256 of each list's file."""

COUNTS = {
    "seen": 1000,
    "held_out": 1000,
    "single": 500,
    "pair": 500,
    "tuning": 500,
    "paired": 4_000,
}
TUNING_SINGLES = 100

# A series of scenes each, that no training or validation set reads.
_SERIES: dict[str, tuple[int, Split]] = {
    "seen": (70_001, "train"),
    "held_out": (70_002, "combo"),
    "single": (70_003, "train"),
    "pair": (70_004, "pair"),
    "tuning": (70_005, "train"),
    "paired": (70_006, "combo"),
}
_FIRST_SEED = {name: (i + 1) * 1_000_000 for i, name in enumerate(_SERIES)}
_WORDING = 203  # a stream of random numbers that the scenes do not use


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a list.

    ``series``, ``split`` and ``index`` name the scene that the words were made from, one right
    answer of many; :meth:`scene` gives it, for reference pictures.
    """

    text: str
    seed: int
    series: int
    split: Split
    index: int

    def scene(self) -> Scene:
        """A scene that the prompt describes."""
        return stilllife.scene(self.series, self.index, self.split)


def build(name: str) -> list[Prompt]:
    """List ``name``, from still life alone: slow, deterministic, and equal to the file."""
    series, split = _SERIES[name]
    made: list[Prompt] = []
    singles = 0
    taken = {_combination(p.scene()) for p in build("seen")} if name == "tuning" else set()
    index = -1
    while len(made) < COUNTS[name]:
        index += 1
        scene = stilllife.scene(series, index, split)
        single = scene.arrangement == Arrangement.SINGLE
        if name in ("seen", "held_out", "paired") and single:
            continue
        if name == "single" and not single:
            continue
        if name == "tuning":
            if single and singles == TUNING_SINGLES:
                continue
            pairs = len(made) - singles
            if not single and pairs == COUNTS[name] - TUNING_SINGLES:
                continue
            if not single and _combination(scene) in taken:
                continue
            singles += single
        words = stilllife.caption(scene, stilllife.generator(series, index, _WORDING))
        made.append(Prompt(words, _FIRST_SEED[name] + len(made), series, split, index))
    return made


def load(name: str, limit: int | None = None) -> list[Prompt]:
    """The committed list ``name``, or its first ``limit`` prompts.

    Raises:
        KeyError: no such list.
        WeightsError: the file is not the one whose digest is committed.
    """
    if name not in DIGESTS:
        raise KeyError(f"no prompt list {name!r}: choose one of {', '.join(DIGESTS)}")
    file = files("safelight.evaluate").joinpath(f"lists/{name}.jsonl")
    data = file.read_bytes()
    if digest(data) != DIGESTS[name]:
        raise WeightsError(
            file, f"is not the list whose SHA-256 is {DIGESTS[name]}.", "Restore the file."
        )
    return list(read(data))[:limit]


def read(data: bytes) -> Iterator[Prompt]:
    """Prompts of a JSON-lines file's bytes."""
    for line in data.splitlines():
        yield Prompt(**json.loads(line))


def dump(prompts: list[Prompt]) -> bytes:
    """A list as JSON lines."""
    fields = ("text", "seed", "series", "split", "index")
    lines = [json.dumps({f: getattr(p, f) for f in fields}) + "\n" for p in prompts]
    return "".join(lines).encode()


def digest(data: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _combination(scene: Scene) -> frozenset[object]:
    """Arrangement and the two things, in whatever order: stricter than the hold-outs' own rule."""
    return frozenset({scene.arrangement, *(thing.pair for thing in scene.things)})


def main(arguments: list[str] | None = None) -> None:
    """Verify the committed lists, or write them again."""
    parser = argparse.ArgumentParser(prog="python -m safelight.evaluate.prompts")
    parser.add_argument("--write", action="store_true", help="make the files again")
    options = parser.parse_args(arguments)
    for name, expected in DIGESTS.items():
        data = dump(build(name))
        found = digest(data)
        file = files("safelight.evaluate").joinpath(f"lists/{name}.jsonl")
        if options.write:
            with open(str(file), "wb") as out:
                out.write(data)
        elif file.read_bytes() != data:
            raise WeightsError(file, "is not what still life gives.", "Was the world changed?")
        same = "as committed" if found == expected else "NOT the committed digest"
        print(f"{name}: {len(data.splitlines())} prompts, sha256 {found}, {same}")


if __name__ == "__main__":
    main()
