"""Parity at full published size: ``python -m benchmarks.parity [--models ...] [--parts ...]``.

Builds each network of every system of the five cards in both libraries at its published size, on
one copy of random weights scaled so that no layer is hidden (:mod:`benchmarks.parity_nets`), one
network in memory at a time. Checks the number of parameters and tensors, every layer's output
relative to its own standard deviation, the ends absolutely, and that planted faults are found.
Networks that several systems share are run once.

Prints a table, writes it with every layer's numbers to ``benchmarks/results/``, and ends with
status 1 if anything differs. Needs about 5 GB of memory.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers

from benchmarks.parity_cases import prior_case, text_case, unet_case, vae_cases, vision_case
from benchmarks.parity_nets import Case, Row, compare, record
from safelight import __version__, presets
from safelight.spec import ModelSpec, PriorSpec, Record, TextSpec, UNetSpec, VAESpec, VisionSpec

TAP_LIMIT = 1e-4
"""Largest difference at any layer, over the standard deviation of its output."""
END_LIMIT = 1e-4
"""Largest absolute difference of what a network puts out, which has about unit scale."""
RESULTS = Path(__file__).parent / "results"

# The checker of v1, and image variations, look at pictures with CLIP-L.
V1_VISION = presets.CLIP_L_VISION
SYSTEMS: dict[str, ModelSpec] = {
    "sd15": presets.SD_V1.replace(vision=V1_VISION),
    "unclip-h": presets.UNCLIP_H,
    "small": presets.SD_SMALL.replace(vision=V1_VISION),
    "v1-inpaint": presets.SD_V1_INPAINT.replace(vision=V1_VISION),
    "variations": presets.IMAGE_VARIATIONS,
    "v2": presets.SD_V2_768,
    "v2-inpaint": presets.SD_V2_INPAINT,
    "v2-depth": presets.SD_V2_DEPTH,
    "unclip-l": presets.UNCLIP_L_PRIOR,
    "x4": presets.X4_UPSCALER,
    # Seconds instead of minutes, to try the command.
    "micro": presets.TINY.replace(
        unet=UNetSpec(
            channels=(16, 32, 32, 48), heads=(2, 2, 2, 2), context_width=24, norm_groups=8
        ),
        vae=VAESpec(channels=(16, 32, 32, 32), norm_groups=8, layers_per_block=1),
        text=presets.TINY_TEXT.replace(width=32, layers=2, context_length=12),
        vision=presets.TINY_VISION.replace(width=32, layers=2),
        prior=PriorSpec(heads=4, head_width=8, layers=3, embedding_width=24, text_tokens=9),
    ),
}

PUBLISHED: dict[tuple[str, str], tuple[int, int]] = {
    ("sd15", "unet"): (859_520_964, 686),
    ("unclip-h", "unet"): (870_173_124, 690),
    ("small", "unet"): (579_384_964, 442),
    ("v1-inpaint", "unet"): (859_535_364, 686),
    ("v2", "unet"): (865_910_724, 686),
    ("v2-inpaint", "unet"): (865_925_124, 686),
    ("v2-depth", "unet"): (865_913_604, 686),
    ("unclip-l", "unet"): (869_517_764, 690),
    ("sd15", "vae"): (83_653_863, 248),
    ("sd15", "text"): (123_060_480, 196),
    ("unclip-h", "text"): (340_387_840, 372),
    ("sd15", "vision"): (303_966_208, 392),
    ("unclip-h", "vision"): (632_076_800, 520),
}
"""Parameters and tensors of the published files; position ids are a buffer, not counted."""
PARAMETERS = {("x4", "unet"): 473_398_020, ("x4", "vae"): 55_325_927}
"""Where the number of tensors is not on record."""
PARTS = ("unet", "vae", "text", "vision", "prior")


@dataclass
class Found:
    """One network checked one way."""

    systems: list[str]
    part: str
    parameters: int
    tensors: int
    published: tuple[int, int | None] | None
    """Parameters, and tensors where they are on record."""
    taps: list[Row]
    ends: list[Row]
    faults: dict[str, float] = field(default_factory=dict)
    """Each planted fault's relative difference at the first tap that shows it, or its largest."""
    seconds: float = 0.0

    @property
    def worst_tap(self) -> Row:
        return max(self.taps, key=lambda row: row.relative)

    @property
    def worst_end(self) -> Row:
        return max(self.ends, key=lambda row: row.max_abs)

    @property
    def as_published(self) -> bool:
        """As many parameters and tensors as the published file."""
        if self.published is None:
            return False
        parameters, tensors = self.published
        return self.parameters == parameters and tensors in (None, self.tensors)

    def problems(self) -> list[str]:
        """What is wrong, one line each; empty if all is well."""
        lines = []
        if self.published and not self.as_published:
            lines.append(
                f"{self.parameters:,} parameters in {self.tensors} tensors, "
                f"published {self.published[0]:,} in {self.published[1] or '?'}"
            )
        if self.worst_tap.relative > TAP_LIMIT:
            lines.append(f"{self.worst_tap.name} differs by {self.worst_tap.relative:.1e}")
        if self.worst_end.max_abs > END_LIMIT:
            lines.append(f"{self.worst_end.name} differs by {self.worst_end.max_abs:.1e}")
        for name, value in self.faults.items():
            if not value > TAP_LIMIT:
                lines.append(f"the planted fault '{name}' was not found ({value:.1e})")
        return [f"{'+'.join(self.systems)} {self.part}: {line}" for line in lines]


class Network(NamedTuple):
    """One network, and the systems that have it."""

    part: str
    spec: Record
    systems: list[str]


def networks(models: Iterable[str], parts: Iterable[str]) -> list[Network]:
    """What the systems are built of; specs that differ in nothing built are one network."""
    found: dict[tuple[str, str], Network] = {}
    for part in parts:
        for model in models:
            spec = getattr(SYSTEMS[model], part)
            if spec is None:
                continue
            if isinstance(spec, UNetSpec | VAESpec):
                spec = spec.replace(sample_size=0)  # a hint for pipelines, not a size of weights
            key = part, spec.model_dump_json()
            found.setdefault(key, Network(part, spec, [])).systems.append(model)
    return list(found.values())


def cases(part: str, spec: Record, side: int) -> Iterator[Case]:
    """The ways to run one network; the autoencoder has two."""
    match spec:
        case UNetSpec():
            yield unet_case(spec, size=(side, side))
        case VAESpec():
            yield from vae_cases(spec, size=(side, side))
        case TextSpec():
            yield text_case(spec)
        case VisionSpec():
            yield vision_case(spec)
        case PriorSpec():
            yield prior_case(spec)
        case _:
            raise TypeError(f"no case for {part}")


def check(systems: list[str], part: str, spec: Record, *, side: int, faults: bool) -> list[Found]:
    """Build one network in both libraries and compare; the weights are gone afterwards."""
    found = []
    start = time.perf_counter()
    for case in cases(part, spec, side):
        parameters = list(case.ours.parameters())
        reference = record(case)
        comparison = compare(case, reference)
        result = Found(
            systems,
            case.part,
            parameters=sum(p.numel() for p in parameters),
            tensors=len(parameters),
            published=_published(systems, part),
            taps=comparison.taps,
            ends=comparison.ends,
        )
        for name, fault in case.faults.items() if faults else ():
            planted = compare(case, reference, fault=fault, stop_at=TAP_LIMIT)
            result.faults[name] = planted.worst_tap().relative
        result.seconds = time.perf_counter() - start
        found.append(result)
        start = time.perf_counter()
    return found


def _published(systems: list[str], part: str) -> tuple[int, int | None] | None:
    """What is on record for any of the systems that share the network."""
    for name in systems:
        if (name, part) in PUBLISHED:
            return PUBLISHED[name, part]
        if (name, part) in PARAMETERS:
            return PARAMETERS[name, part], None
    return None


# -- report -------------------------------------------------------------------------------------

COLUMNS = "systems | part | parameters | taps | worst tap, relative | worst end | faults | s"


def line(found: Found) -> str:
    """One row of the table."""
    least = f" (least {min(found.faults.values()):.0e})" if found.faults else ""
    caught = sum(value > TAP_LIMIT for value in found.faults.values())
    cells = [
        ", ".join(found.systems),
        found.part,
        f"{found.parameters:,} in {found.tensors}" + (" = published" if found.as_published else ""),
        str(len(found.taps)),
        f"{found.worst_tap.relative:.1e} {found.worst_tap.name if found.worst_tap.max_abs else ''}",
        f"{found.worst_end.max_abs:.1e} {found.worst_end.name}",
        f"{caught} of {len(found.faults)} found{least}",
        f"{found.seconds:.0f}",
    ]
    return "| " + " | ".join(cell.strip() for cell in cells) + " |"


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"model name\s*: (.*)", info.read_text(encoding="utf-8"))
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "safelight": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def write(results: list[Found], where: Path, *, side: int, missing: list[str]) -> Path:
    """``parity-<machine>-<date>.json`` and ``.md``; the path of the second."""
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    this, stem = machine(), _stem()
    where.mkdir(parents=True, exist_ok=True)
    limits = {"tap": TAP_LIMIT, "end": END_LIMIT}
    networks = [
        {
            **asdict(found),
            "taps": [row._asdict() for row in found.taps],
            "ends": [row._asdict() for row in found.ends],
        }
        for found in results
    ]
    data = {
        "machine": this,
        "limits": limits,
        "latents": side,
        "networks": networks,
        "missing": missing,
    }
    (where / f"{stem}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    problems = [problem for found in results for problem in found.problems()]
    text = [
        "# Parity with diffusers and transformers",
        "",
        "Random weights scaled to unit outputs, shared by both libraries; see",
        "`benchmarks/parity.py`. *Worst tap* is the largest difference at any layer over the",
        "standard deviation of its output, *worst end* the largest absolute difference of an",
        f"output of about unit scale; limits {TAP_LIMIT:.0e} and {END_LIMIT:.0e}. Latents are",
        f"{side}x{side}.",
        "",
        f"| {COLUMNS} |",
        "|" + "---|" * len(COLUMNS.split("|")),
        *[line(found) for found in results],
        "",
        *([f"- {problem}" for problem in problems] or ["Everything agrees."]),
        *([f"Not run yet: {', '.join(missing)}."] if missing else []),
        "",
        f"Peak memory {peak_gb:.1f} GB. " + ", ".join(f"{k} {v}" for k, v in this.items()) + ".",
        "",
    ]
    path = where / f"{stem}.md"
    path.write_text("\n".join(text), encoding="utf-8")
    return path


def _stem() -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", machine()["cpu"].lower()).strip("-")
    return f"parity-{slug}-{datetime.date.today():%Y-%m-%d}"


def earlier(where: Path, side: int) -> list[Found]:
    """What a run of today on this machine has written."""
    path = where / f"{_stem()}.json"
    if not path.exists():
        return []
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept["latents"] != side:
        return []
    return [
        Found(
            **{
                **record,
                "taps": [Row(**row) for row in record["taps"]],
                "ends": [Row(**row) for row in record["ends"]],
            }
        )
        for record in kept["networks"]
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description=(__doc__ or "").split("\n\n")[1]
    )
    every = ",".join(name for name in SYSTEMS if name != "micro")
    parser.add_argument("--models", default=every, help="of " + ", ".join(SYSTEMS))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--side", type=int, default=16, help="side of the latents (default 16)")
    parser.add_argument(
        "--resume", action="store_true", help="keep what a run of the same day has found"
    )
    parser.add_argument("--no-faults", action="store_true", help="do not plant faults")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report")
    given = parser.parse_args(arguments)
    models, parts = given.models.split(","), given.parts.split(",")
    for name, known, kind in (
        *((m, SYSTEMS, "model") for m in models),
        *((p, PARTS, "part") for p in parts),
    ):
        if name not in known:
            parser.error(f"no {kind} {name}; there are {', '.join(known)}")

    results = earlier(given.out, given.side) if given.resume else []
    path = given.out
    known = {(tuple(found.systems), found.part.split()[0]) for found in results}
    todo = [
        network
        for network in networks(models, parts)
        if (tuple(network.systems), network.part) not in known
    ]
    print(f"| {COLUMNS} |", flush=True)
    while todo:
        part, spec, systems = todo.pop(0)
        for found in check(systems, part, spec, side=given.side, faults=not given.no_faults):
            results.append(found)
            print(line(found), flush=True)
        gc.collect()
        # After every network, so that an interrupted run leaves what it found.
        missing = [f"{'+'.join(network.systems)} {network.part}" for network in todo]
        path = write(results, given.out, side=given.side, missing=missing)
    problems = [problem for found in results for problem in found.problems()]
    print(*problems, f"written to {path}", sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
