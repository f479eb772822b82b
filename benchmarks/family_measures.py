"""What each member of the tiny family is measured by: a function a system, numbers and a sheet.

Scenes are the held-out ones of the list ``paired``, which no training saw; the judge reads real
renders of the same scenes for the ceiling. Masks and depth maps are the renderer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from safelight.data import stilllife
from safelight.data.attributes import wanted_classes
from safelight.data.stilllife import COLOURS, SHAPES, Scene
from safelight.evaluate import prompts, segment
from safelight.evaluate.drawing import drawn, pixels
from safelight.evaluate.judge import Judge
from safelight.evaluate.metrics import psnr
from safelight.evaluate.score import Share, read, renders, score_list, wanted_of
from safelight.generate import Generator
from safelight.request import GenerateRequest

BATCH = 50
SHOWN = 12
Progress = Callable[[str, int, int], None]


@dataclass
class Measured:
    """Numbers for the results' file, and pictures for the page."""

    numbers: dict[str, Any]
    shown: list[tuple[Image.Image, str]] = field(default_factory=list)
    columns: int = 6


def share(flags: np.ndarray) -> dict[str, Any]:
    """The share of True, for JSON."""
    return share_of(Share.of(np.asarray(flags)))


def share_of(found: Share) -> dict[str, Any]:
    """A share with its interval, for JSON."""
    numbers = {"right": found.right, "total": found.total, "share": round(found.value, 5)}
    return {**numbers, "wilson95": [round(v, 5) for v in found.interval]}


def text(generator: Generator, count: int, progress: Progress, **wishes: Any) -> Measured:
    """Compositional accuracy on the held-out list, with every prompt's own answer."""
    chosen = prompts.load("paired", count)
    score = score_list(
        "paired", chosen, drawn(generator, **wishes), Judge.load(),
        ceilings=False, batch=BATCH, progress=progress,
    )  # fmt: skip
    cells = {name: share_of(cell) for name, cell in score.generated.cells.items() if cell.total}
    each = "".join("01"[int(right)] for right in score.generated.right)
    shown = [(Image.fromarray(p), q.text) for p, q in zip(score.first, chosen, strict=False)]
    return Measured({"cells": cells, "each": each}, shown[:SHOWN])


def parts(total: int) -> Iterator[slice]:
    """Slices of a batch each."""
    for start in range(0, total, BATCH):
        yield slice(start, min(start + BATCH, total))


def made_of(
    generator: Generator, requests: Sequence[GenerateRequest], stage: str, progress: Progress
) -> np.ndarray:
    """The pictures of requests, uint8 ``(N, H, W, 3)``."""
    found = []
    for part in parts(len(requests)):
        results = generator.generate(request=list(requests[part]))
        found += [pixels(result, "for a request") for result in results]
        progress(stage, len(found), len(requests))
    return np.stack(found)


def seen_cells(made: np.ndarray, scenes: Sequence[Scene], judge: Judge) -> dict[str, Any]:
    """What the judge finds of scenes in pictures."""
    wanted = [stilllife.parse(stilllife.plain_caption(scene)) for scene in scenes]
    reading = read(made, [w for w in wanted if w is not None], judge)
    return {name: share_of(cell) for name, cell in reading.cells.items() if cell.total}


# -- repainting -----------------------------------------------------------------------------------


def repainted(scene: Scene, rng: np.random.Generator) -> tuple[Scene, int]:
    """A scene with one thing exchanged for another in shape and colour, and which of the two."""
    slot = int(rng.integers(2))
    old, other = (scene.a, scene.b) if slot == 0 else (scene.b, scene.a)
    assert old is not None
    assert other is not None
    while True:
        shape, colour = SHAPES[rng.integers(len(SHAPES))], COLOURS[rng.integers(len(COLOURS))]
        new = replace(old, shape=shape, colour=colour)
        pair_seen = (colour, shape) not in stilllife.UNSEEN_PAIRS
        if shape != old.shape and colour not in (old.colour, other.colour) and pair_seen:
            return replace(scene, **{"ab"[slot]: new}), slot


def inpaint(generator: Generator, count: int, progress: Progress, **wishes: Any) -> Measured:
    """One of two things is masked and another asked for in its place."""
    size, judge = generator.model.spec.native_size, Judge.load()
    before = [p.scene() for p in prompts.load("paired", count)]
    after, slots, requests, outside = [], [], [], []
    rng = np.random.default_rng(0)
    for k, scene in enumerate(before):
        changed, slot = repainted(scene, rng)
        both = stilllife.render_full([scene, changed], size)
        covered = Image.fromarray(both.masks[:, slot].any(0)).convert("L")
        mask = covered.filter(ImageFilter.MaxFilter(13))  # 6 pixels around
        requests.append(
            GenerateRequest.from_kwargs(
                prompt=stilllife.plain_caption(changed),
                image=Image.fromarray(both.rgb[0]),
                mask=mask,
                mask_crop=size,
                seed=k,
                count=1,
                **wishes,
            )
        )
        after.append(changed)
        slots.append(slot)
        outside.append(np.asarray(mask) < 128)
    made = made_of(generator, requests, "inpainting", progress)
    given = np.concatenate(list(renders(before, size)))
    real = np.concatenate(list(renders(after, size)))
    kept = np.stack(outside)
    change = np.abs(made.astype(int) - given.astype(int)).max(-1)
    want = wanted_classes(wanted_of_scenes(after))
    said, ceiling = judge.classes(made), judge.classes(real)
    rows = np.arange(count)[:, None]
    inside = np.array(slots)[:, None] * 2 + np.array([1, 2])  # shape and colour of that thing
    right = (said[rows, inside] == want[rows, inside]).all(1)
    numbers = {
        "largest_change_outside": int(change[kept].max()),
        "inside_right": share(right),
        "inside_right_of_renders": share((ceiling[rows, inside] == want[rows, inside]).all(1)),
        "everything_right": share((said == want).all(1)),
        "everything_right_of_renders": share((ceiling == want).all(1)),
    }
    shown = []
    for k in range(6):
        hole = np.where(kept[k][..., None], given[k], 128).astype(np.uint8)
        shown += [
            (Image.fromarray(hole), "given: grey is masked"),
            (Image.fromarray(made[k]), requests[k].prompt),
        ]
    return Measured(numbers, shown)


def wanted_of_scenes(scenes: Sequence[Scene]) -> list[Any]:
    """What the plain captions of scenes ask for."""
    return [stilllife.parse(stilllife.plain_caption(scene)) for scene in scenes]


# -- depth ----------------------------------------------------------------------------------------


def recoloured(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with both colours new, different ones, of seen pairs."""
    assert scene.b is not None
    while True:
        one, two = (COLOURS[k] for k in rng.choice(len(COLOURS), 2, replace=False))
        a, b = replace(scene.a, colour=one), replace(scene.b, colour=two)
        if one == scene.a.colour or two == scene.b.colour:
            continue
        if not {a.pair, b.pair} & stilllife.UNSEEN_PAIRS:
            return replace(scene, a=a, b=b)


def depth(generator: Generator, count: int, progress: Progress, **wishes: Any) -> Measured:
    """The renderer's depth map of a scene, and a prompt that asks for other colours."""
    size, judge = generator.model.spec.native_size, Judge.load()
    rng = np.random.default_rng(0)
    scenes = [recoloured(p.scene(), rng) for p in prompts.load("paired", count)]
    requests, truth, maps = [], [], []
    for part in parts(count):
        drawn_ = stilllife.render_full(scenes[part], size)
        truth.append(drawn_.masks)
        for scene, far in zip(scenes[part], drawn_.depth, strict=True):
            near = far.max() - far
            grey = Image.fromarray((near / near.max() * 65535).astype(np.uint16))
            maps.append(grey)
            requests.append(
                GenerateRequest.from_kwargs(
                    prompt=stilllife.plain_caption(scene),
                    depth=grey,
                    seed=len(requests),
                    count=1,
                    **wishes,
                )
            )
    made = made_of(generator, requests, "depth", progress)
    real = np.concatenate(list(renders(scenes, size)))
    shapes = np.concatenate(truth)
    numbers = {
        "cells": seen_cells(made, scenes, judge),
        "cells_of_renders": seen_cells(real, scenes, judge),
        "overlap": round(float(np.mean(overlap(made, shapes, scenes))), 4),
        "overlap_of_renders": round(float(np.mean(overlap(real, shapes, scenes))), 4),
        "overlap_of_other_pictures": round(
            float(np.mean(overlap(np.roll(real, 1, axis=0), shapes, None))), 4
        ),
    }
    shown = []
    for k in range(6):
        grey = np.asarray(maps[k], dtype=float) / 65535 * 255
        shown += [
            (Image.fromarray(grey.astype(np.uint8)), "given: depth"),
            (Image.fromarray(made[k]), requests[k].prompt),
        ]
    return Measured(numbers, shown)


def overlap(pictures: np.ndarray, masks: np.ndarray, scenes: Sequence[Scene] | None) -> np.ndarray:
    """Intersection over union of where things are: by colour in the picture, by the renderer's
    masks in truth. ``(N,)``.

    Args:
        masks: bool ``(N, 2, H, W)``.
        scenes: whose colours to look for; None: any colour.
    """
    found = segment.colour_masks(pictures)
    if scenes is not None:
        for k, scene in enumerate(scenes):
            wanted = {COLOURS.index(thing.colour) for thing in scene.things}
            for colour in set(range(len(COLOURS))) - wanted:
                found[k, colour] = False
    here = found.any(1)
    step = masks.shape[-1] // segment.SIZE
    there = masks.any(1)[:, ::step, ::step]
    return (here & there).sum((1, 2)) / np.maximum((here | there).sum((1, 2)), 1)


# -- enlarging ------------------------------------------------------------------------------------


def upscale(generator: Generator, count: int, progress: Progress, **wishes: Any) -> Measured:
    """Renders at a quarter of their size, enlarged, against the renders; bicubic beside it."""
    size = 128
    chosen = prompts.load("paired", count)
    real = np.concatenate(list(renders([p.scene() for p in chosen], size)))
    small = [
        Image.fromarray(picture).resize((size // 4, size // 4), Image.Resampling.BICUBIC)
        for picture in real
    ]
    requests = [
        GenerateRequest.from_kwargs(prompt=p.text, image=s, seed=p.seed, count=1, **wishes)
        for p, s in zip(chosen, small, strict=True)
    ]
    made = made_of(generator, requests, "x4", progress)
    plain = [np.asarray(s.resize((size, size), Image.Resampling.BICUBIC)) for s in small]
    ours, theirs = psnr(real, made), psnr(real, np.stack(plain))
    gain = ours - theirs
    half = 1.96 * gain.std() / np.sqrt(len(gain))
    numbers = {
        "psnr": round(float(ours.mean()), 3),
        "psnr_bicubic": round(float(theirs.mean()), 3),
        "gain": round(float(gain.mean()), 3),
        "gain95": [round(float(gain.mean() - half), 3), round(float(gain.mean() + half), 3)],
        "better_in": share(gain > 0),
        "count": count,
    }
    shown = []
    for k in range(4):
        shown += [
            (Image.fromarray(plain[k]), f"bicubic, {theirs[k]:.1f} dB"),
            (Image.fromarray(made[k]), f"{generator.model.spec.name}, {ours[k]:.1f} dB"),
            (Image.fromarray(real[k]), "the render"),
        ]
    return Measured(numbers, shown)


# -- looking --------------------------------------------------------------------------------------


def mixed(
    generator: Generator, count: int, progress: Progress, levels: Sequence[int], **wishes: Any
) -> Measured:
    """A picture and a prompt that says something else: who is heard, by noise level."""
    size, judge = generator.model.spec.native_size, Judge.load()
    chosen = prompts.load("paired", 2 * count)
    shown_to, told = chosen[:count], chosen[count:]
    looked = [p.scene() for p in shown_to]
    given = np.concatenate(list(renders(looked, size)))
    asked, seen = wanted_classes(wanted_of(told)), wanted_classes(wanted_of_scenes(looked))
    rows, shown = [], []
    for level in levels:
        requests = [
            GenerateRequest.from_kwargs(
                prompt=p.text,
                image=Image.fromarray(picture),
                noise_level=level,
                seed=p.seed,
                count=1,
                **wishes,
            )
            for p, picture in zip(told, given, strict=True)
        ]
        made = made_of(generator, requests, f"noise level {level}", progress)
        said = judge.classes(made)
        rows.append(
            {
                "noise_level": level,
                "prompt_obeyed": share((said == asked).all(1)),
                "picture_kept": share((said == seen).all(1)),
            }
        )
        if not shown:
            shown = [(Image.fromarray(given[k]), "given") for k in range(6)]
        words = [f"{level}: {p.text}" for p in told[:6]]
        shown += [(Image.fromarray(m), w) for m, w in zip(made, words, strict=False)]
    return Measured({"levels": rows}, shown)
