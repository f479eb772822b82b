"""The tiny family, member by member: ``python -m benchmarks.family [MEMBER …] [--count N]``.

``family.toml`` says which members there are and how each is measured. Every run keeps its numbers
in ``results/family/MEMBER.json`` and its pictures in ``docs/assets/family``, and writes
docs/family.md from what is kept (:mod:`benchmarks.family_page`); without members it does only that.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import safelight
from benchmarks import family_measures as measures
from benchmarks.family_measures import Measured, share_of
from benchmarks.family_page import ASSETS, DOCS, FILE, KEPT, page, rows_of
from benchmarks.measure import machine
from safelight.checker import Checker
from safelight.data.sheet import picture_sheet
from safelight.generate import Generator
from safelight.model import Model
from safelight.nets.unet import UNet
from safelight.parts import load_unet

QUALITY = 82  # of WebP
Member = dict[str, Any]


def members() -> dict[str, Member]:
    """The file's, by name."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))["member"]


def generator_of(member: Member, name: str) -> Generator:
    """A shipped member; or a run's UNet in the place of one's, for students that do not ship."""
    base = safelight.load(member.get("model", name), device="cpu")
    if "run" not in member:
        return base
    unet, schedule = load_unet(Path(member["run"]))
    old = base.model
    spec = old.spec.replace(
        name=name, unet=unet.spec, schedule=schedule.replace(sampler=old.spec.schedule.sampler)
    )
    return Generator(
        Model(
            spec, unet, old.vae, old.text, old.vision, old.tokenizer, source=f"run:{member['run']}"
        )
    )


def cost(unet: UNet, tokens: int) -> dict[str, Any]:
    """Weights, and floating-point operations of one step of one picture."""
    spec = unet.spec
    guided = not spec.guidance_embedding_size
    rows = 2 if guided else 1
    side = spec.sample_size
    slots: dict[str, torch.Tensor] = {}
    if spec.class_embedding == "projection":
        slots["vector"] = torch.zeros(rows, spec.class_embedding_size)
    elif spec.class_embedding == "table":
        slots["vector"] = torch.zeros(rows, dtype=torch.long)
    if spec.guidance_embedding_size:
        slots["guidance"] = torch.zeros(rows, spec.guidance_embedding_size)
    x = torch.zeros(rows, spec.in_channels, side, side)
    words = torch.zeros(rows, tokens, spec.context_width)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        unet(x, torch.zeros(rows), words, **slots)
    weights = sum(p.numel() for p in unet.parameters())
    return {"parameters": weights, "flop_a_step": counter.get_total_flops(), "guided": guided}


def measured(
    name: str, member: Member, count: int | None, bar: Any
) -> tuple[dict[str, Any], Measured]:
    """Measure a member by its ``measure``: its numbers with all that they were taken with, and
    what is shown."""
    kind, wishes = member["measure"], member.get("wishes", {})
    count = count or member["count"]
    if kind == "safety":
        found, facts = safety(name, count), {}
    else:
        generator = generator_of(member, name)
        with torch.inference_mode():
            if kind == "variations":
                found = variations(generator, name, count, member, bar)
            elif kind == "mixed":
                found = unclip(generator, name, count, member, bar)
            else:
                found = getattr(measures, kind)(generator, count, bar, **wishes)
            model = generator.model
            tokens = 1 if model.spec.text is None else model.spec.text.context_length
            facts = {"weights": model.digest, **cost(model.unet, tokens)}
        for more in member.get("also", []):
            part = getattr(measures, kind)(generator, more["count"], bar, **more["wishes"])
            found.numbers.setdefault("also", []).append({**more, "cells": part.numbers["cells"]})
    numbers = {
        "schema": 1,
        "member": name,
        "measure": kind,
        "count": count,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        **facts,
        **found.numbers,
    }
    return numbers, found


def keep(name: str, numbers: dict[str, Any], found: Measured) -> None:
    """Write a member's numbers, and its sheet."""
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    if found.shown:
        ASSETS.mkdir(parents=True, exist_ok=True)
        pictures, words = zip(*found.shown, strict=True)
        sheet = picture_sheet(pictures, words, size=128, columns=found.columns)
        sheet.save(ASSETS / f"{name}.webp", quality=QUALITY, method=6)


def variations(generator: Generator, name: str, count: int, member: Member, bar: Any) -> Measured:
    """What pictures keep: :mod:`safelight.evaluate.variation`, on the held-out list."""
    from safelight.evaluate import prompts, variation
    from safelight.evaluate.judge import Judge

    extractor = variation.model_extractor(generator, name, None)
    chosen, judge, rows = prompts.load("paired", count), Judge.load(), []
    shown: list[tuple[Any, str]] = []
    for level in member.get("levels", [None]):
        vary = variation.varied(generator, noise_level=level, **member.get("wishes", {}))
        row = variation.kept_of_list(
            "paired", chosen, vary, extractor, judge, size=generator.model.spec.native_size,
            progress=lambda done, s=f"level {level}": bar(s, done, count),
        )  # fmt: skip
        assert row.outputs is not None
        assert row.inputs is not None
        each = "".join("01"[int(right)] for right in row.outputs.right)
        rows.append(
            {
                "noise_level": level,
                "cosine": row.fidelity.model_dump(),
                "cells": {k: share_of(c) for k, c in row.outputs.cells.items() if c.total},
                "cells_of_inputs": {k: share_of(c) for k, c in row.inputs.cells.items() if c.total},
                "each": each,
            }
        )
        if level is None:
            for given, made in row.shown[:6]:
                shown += [(given, "given"), (made, "a variation")]
        else:
            if not shown:
                shown = [(given, "given") for given, _ in row.shown[:6]]
            shown += [(made, f"noise level {level}") for _, made in row.shown[:6]]
    return Measured({"levels": rows}, shown)


def unclip(generator: Generator, name: str, count: int, member: Member, bar: Any) -> Measured:
    """Fidelity by noise level, then pictures and prompts that disagree."""
    alone = variations(generator, name, count, member, bar)
    wishes = member.get("wishes", {})
    both = measures.mixed(generator, count, bar, member["levels"], **wishes)
    return Measured({"levels": alone.numbers["levels"], "mixed": both.numbers["levels"]},
                    both.shown)  # fmt: skip


def safety(name: str, count: int) -> Measured:
    """The curve of a checker on held-out renders, half of them with what it forbids."""
    from PIL import Image

    from safelight.cli.stilllife import Part, sort
    from safelight.safety.measure import measure

    checker = Checker.load(name)
    with tempfile.TemporaryDirectory(prefix="safelight-family-") as desk:
        folder = Path(desk) / "sorted"
        sort(checker.names[0].removeprefix("a "), folder, count, 128, 3, Part.combo)
        safe, unsafe = (sorted((folder / part).iterdir()) for part in ("safe", "unsafe"))
        roc = measure(checker, safe, unsafe)
        shown = []
        for path in [p for pair in zip(safe, unsafe, strict=False) for p in pair][:12]:
            picture = Image.open(path).convert("RGB")
            flagged = bool((checker.scores([picture]).concepts > 0).any())
            shown.append((picture, "flagged" if flagged else "passed"))
        wrong = len(roc.wrong)
    return Measured({"area": round(float(roc.area), 5), "wrong": wrong}, shown)


def main(arguments: list[str] | None = None) -> int:
    """See the file's head."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.family", description=__doc__)
    parser.add_argument("members", nargs="*", help="default: none, and only the page is written")
    parser.add_argument("--count", type=int, help="pictures, instead of the file's")
    parser.add_argument("--no-write", action="store_true", help="print the numbers, keep nothing")
    given = parser.parse_args(arguments)
    known = members()
    for name in given.members:
        if name not in known:
            parser.error(f"no member {name!r}: choose of {', '.join(known)}")

    def bar(stage: str, done: int, total: int) -> None:
        print(f"\r{stage} {done}/{total}", end="", file=sys.stderr, flush=True)

    for name in given.members:
        began = time.monotonic()
        numbers, found = measured(name, known[name], given.count, bar)
        numbers["seconds"] = round(time.monotonic() - began, 1)
        print(file=sys.stderr)
        for what, value in rows_of(known[name], numbers):
            print(f"{name}: {what}: {value}")
        if not given.no_write:
            keep(name, numbers, found)
    if not given.no_write:
        (DOCS / "family.md").write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
