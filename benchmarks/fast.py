"""What each fast mode gives and costs on the tiny family.

    python -m benchmarks.fast [--count 4000] [--model tiny-v]

Speed: every lever, the card's settings and diffusers with its default of 50 steps make the same
pictures in turns, one at a time and sixteen at once. Quality: each lever draws the list ``paired``;
the judge's verdicts are paired with those of 50 steps of PLMS (95 % interval), and the pictures
compared with its pictures of the same seeds. Verdicts are kept as they are made, so that a run that
was stopped goes on; ``--page`` only writes docs/fast.md and its plot from what is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import safelight
from benchmarks import measure, tiny_model
from benchmarks.fast_page import write_page
from safelight import shipped
from safelight.data.attributes import wanted_classes
from safelight.diffusion.noise import initial_noise
from safelight.evaluate import prompts
from safelight.evaluate.drawing import drawn, unguarded
from safelight.evaluate.judge import Judge
from safelight.evaluate.metrics import psnr
from safelight.evaluate.paired import paired
from safelight.evaluate.prompts import Prompt
from safelight.evaluate.score import wanted_of
from safelight.generate import Generator

KEPT = measure.RESULTS / "fast"
BATCHES = (1, 16)
CHUNK = 20
REFERENCE, CARD, PEER = "50 steps of PLMS", "the card's", "diffusers, 50 steps"
MARGIN, TARGET = -0.015, 8.0
"""The issue's: lower end of the interval in accuracy, and how many times faster than diffusers."""

_MULTI = {"sampler": "dpm++2m"}
LEVERS: dict[str, dict[str, Any]] = {
    REFERENCE: {"steps": 50, "sampler": "pndm"},
    CARD: {},
    "15 steps": {"steps": 15, **_MULTI},
    "10 steps": {"steps": 10, **_MULTI},
    "10 steps, AYS": {"steps": 10, **_MULTI, "schedule": "ays"},
    "10 steps, AYS, 3M": {"steps": 10, "sampler": "dpm++3m", "schedule": "ays"},
    "10 steps, UniPC": {"steps": 10, "sampler": "unipc"},
    "8 steps, AYS": {"steps": 8, **_MULTI, "schedule": "ays"},
    "6 steps, AYS": {"steps": 6, **_MULTI, "schedule": "ays"},
    "guidance until 0.8": {"guidance_until": 0.8},
    "guidance until 0.6": {"guidance_until": 0.6},
    "guidance until 0.4": {"guidance_until": 0.4},
    "guidance until 0.6, frozen": {"guidance_until": 0.6, "freeze_context": True},
    "guidance within 0.3 and 5": {"guidance_interval": (0.3, 5.0)},
    "block cache 2": {"block_cache": 2},
    "block cache 2, branch 1": {"block_cache": 2, "block_cache_branch": 1},
    "block cache 3": {"block_cache": 3},
    "block cache 3, quadratic": {"block_cache": 3, "block_cache_spacing": "quadratic"},
    "tiny decoder": {"decoder": "tiny"},
    "--fast 1": {"fast": 1},
    "--fast 2": {"fast": 2},
    "--fast 3": {"fast": 3},
}


def main() -> None:
    parser = measure.options(__doc__ or "", rounds=7)
    parser.add_argument("--model", default="tiny-v")
    parser.add_argument("--count", type=int, default=4000, help="prompts of the list paired")
    parser.add_argument("--only", nargs="+", help="levers; the reference is always there")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="pictures at once")
    parser.add_argument("--kept", type=Path, default=KEPT, help="where verdicts and results lie")
    parser.add_argument("--no-speed", action="store_true", help="quality alone")
    parser.add_argument("--page", action="store_true", help="the page alone, from what is kept")
    options = parser.parse_args()
    results = options.kept / f"{options.model}.json"
    if not options.page:
        record = measured(options, results)
        options.kept.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print("\n".join(_told(record)))
    if not options.no_write:
        write_page(json.loads(results.read_text(encoding="utf-8")))


def measured(options: argparse.Namespace, results: Path) -> dict[str, Any]:
    """All numbers, for the results' file."""
    torch.set_num_threads(options.threads)
    report = measure.Report("fast", "Fast modes")
    report.clean = options.no_speed or measure.quiet(force=options.force)
    clock = measure.clock(options, report)
    sides = players(options.model, options.only)
    old = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    speed = old.get("speed", {})
    if not options.no_speed:
        speed = {
            str(n): speeds(options.model, sides, n, options.rounds, clock) for n in options.batches
        }
    found = quality(options.model, sides, options.count, options.kept)
    return {
        "schema": 1,
        "model": options.model,
        "count": options.count,
        "machine": measure.machine(),
        "clean": report.clean,
        "notes": report.notes,
        "speed": speed,
        "levers": found,
        "target": {"margin": MARGIN, "speed": TARGET},
    }


Player = tuple[Generator, dict[str, Any]]


def players(model: str, only: Sequence[str] | None) -> dict[str, Player]:
    """Each lever's generator and wishes. Levers that the model has no part for are left out; its
    student is one more, where it ships."""
    base = safelight.load(model, device="cpu")
    spec = base.model.spec
    chosen = [n for n in LEVERS if not only or n in only or n == REFERENCE]
    found: dict[str, Player] = {
        name: (base, LEVERS[name])
        for name in chosen
        if LEVERS[name].get("decoder") != "tiny" or spec.tiny_decoder is not None
    }
    if student := shipped.student(model):
        few = safelight.load(student, device="cpu")
        steps = few.model.spec.steps
        found[f"{student}, {steps} steps"] = (few, {})
        found["--fast 3"] = (few, {"fast": 3})
    return found


# -- speed ----------------------------------------------------------------------------------------


def speeds(
    model: str, sides: Mapping[str, Player], count: int, rounds: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Seconds of every side, in turns, and how many times faster than diffusers and the card."""
    base = next(iter(sides.values()))[0].model
    with tempfile.TemporaryDirectory() as scratch:
        tiny_model.export(base, Path(scratch) / model)
        pipe = tiny_model.peer(Path(scratch) / model, channels_last=False)
    calls: dict[str, Callable[[], Any]] = {PEER: lambda: theirs(pipe, base, count)}
    for name, (generator, wishes) in sides.items():
        calls[name] = lambda g=generator, w=wishes: g.generate(
            tiny_model.PROMPT, seed=7, count=count, **w, **unguarded(g)
        )
    times = measure.in_turns(calls, rounds=rounds, clock=clock)
    found = {}
    for name, seconds in times.items():
        against = {}
        for other in (PEER, CARD):
            if other in times:
                each = [b / a for a, b in zip(seconds, times[other], strict=True)]
                against[other] = [statistics.median(each), min(each), max(each)]
        found[name] = {"seconds": statistics.median(seconds), "ratio": against}
    return found


def theirs(pipe: Any, model: Any, count: int) -> list[Any]:
    """diffusers' pictures with its default number of steps, and the card's guidance."""
    side = model.spec.unet.sample_size
    noise = torch.cat([initial_noise(7 + k, (1, 4, side, side)) for k in range(count)])
    return pipe(
        [tiny_model.PROMPT] * count,
        latents=noise,
        num_inference_steps=50,
        guidance_scale=model.spec.guidance_scale,
    ).images


# -- quality --------------------------------------------------------------------------------------


def quality(
    model: str, sides: Mapping[str, Player], count: int, kept: Path
) -> dict[str, dict[str, Any]]:
    """Accuracy of every lever, paired with the reference's, and PSNR to its pictures."""
    file = kept / f"{model}.verdicts.jsonl"
    chosen = prompts.load("paired", count)
    known = dict(_kept(file, sides))
    judge = Judge.load()
    if file.is_file() and not file.read_bytes().endswith(b"\n"):
        with file.open("a", encoding="utf-8") as out:  # half a line, of a run that was killed
            out.write("\n")
    for start in range(0, len(chosen), CHUNK):
        part = chosen[start : start + CHUNK]
        lacking = [
            name
            for name in sides
            if len(known.get((start, name), {"each": ""})["each"]) < len(part)
        ]
        if not lacking:
            continue
        base = _pictures(sides[REFERENCE], part)
        for name in lacking:
            made = base if name == REFERENCE else _pictures(sides[name], part)
            line = _line(start, name, sides[name], _right(made, part, judge), base, made)
            known[start, name] = line
            kept.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
        print(f"{start + len(part)} of {len(chosen)} prompts", flush=True)
    each = {name: _joined(known, name, len(chosen)) for name in sides}
    reference = each[REFERENCE][0]
    found = {}
    for name, (right, decibels) in each.items():
        pair = paired(reference, right)
        found[name] = {
            "wishes": sides[name][1],
            "accuracy": pair.second,
            "difference": pair.difference,
            "interval": [pair.low, pair.high],
            "psnr": None if name == REFERENCE else round(float(np.mean(decibels)), 2),
        }
    return found


def _pictures(player: Player, part: Sequence[Prompt]) -> np.ndarray:
    generator, wishes = player
    make = drawn(generator, **wishes, **unguarded(generator))
    return make([p.text for p in part], [p.seed for p in part])


def _right(made: np.ndarray, part: Sequence[Prompt], judge: Judge) -> np.ndarray:
    return (judge.classes(made) == wanted_classes(wanted_of(part))).all(1)


def _line(
    start: int, name: str, player: Player, right: np.ndarray, base: np.ndarray, made: np.ndarray
) -> dict[str, Any]:
    apart = [99.0] * len(made) if made is base else np.minimum(psnr(base, made), 99.0).tolist()
    return {
        "start": start,
        "lever": name,
        "digest": _digest(player),
        "each": "".join("01"[int(flag)] for flag in right),
        "psnr": [round(value, 2) for value in apart],
    }


def _digest(player: Player) -> str:
    """What a verdict holds for: the weights, and the request with its preset spelled out."""
    generator, wishes = player
    (request,) = generator.requests("a red cube", seed=0, **wishes)
    return f"{generator.model.digest[:12]}:{request.digest[:12]}"


def _kept(
    file: Path, sides: Mapping[str, Player]
) -> Iterator[tuple[tuple[int, str], dict[str, Any]]]:
    """Earlier verdicts that still hold. A line that a kill cut off counts for none."""
    digests = {name: _digest(player) for name, player in sides.items()}
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if digests.get(line["lever"]) == line["digest"]:
            yield (line["start"], line["lever"]), line


def _joined(
    known: Mapping[tuple[int, str], Mapping[str, Any]], name: str, count: int
) -> tuple[np.ndarray, list[float]]:
    lines = [known[start, name] for start in range(0, count, CHUNK)]
    flags = "".join(line["each"] for line in lines)[:count]
    decibels = [value for line in lines for value in line["psnr"]][:count]
    return np.array([flag == "1" for flag in flags]), decibels


def _told(record: Mapping[str, Any]) -> Iterator[str]:
    for name, lever in record["levers"].items():
        low, high = (100 * v for v in lever["interval"])
        words = [f"{100 * lever['accuracy']:5.1f} %  {low:+.1f} to {high:+.1f} points"]
        for count, sides in record["speed"].items():
            if PEER in sides.get(name, {}).get("ratio", {}):
                words.append(f"{sides[name]['ratio'][PEER][0]:.1f}x of {count}")
        yield f"{name:30} {', '.join(words)}"


if __name__ == "__main__":
    main()
