"""Every system beside the reference's: ``python -m benchmarks.systems [--only WORDS]``.

For each system of the cards (:mod:`benchmarks.systems_cases`) a micro model with random weights is
made by diffusers and saved as a published folder. Then, with the commands that users have:

1. the folder is loaded, and every tensor is the one that was saved;
2. ``safelight models convert`` makes an original single file of it; that is loaded;
3. diffusers' pipeline and Safelight run from the same noise, with three samplers, guided and not;
   the largest difference of the latents is kept;
4. ``safelight models export`` and ``models convert`` write folders, from which diffusers' pipeline
   must make the latents that it made from its own.

The column of the full size is read from the kept results of ``python -m benchmarks.parity``.
Writes ``benchmarks/results/systems-<machine>-<date>.json`` and the table in ``docs/parity.md``, and
ends with status 1 if anything differs. Takes about two minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor

from benchmarks import parity
from benchmarks.systems_cases import SEED, STEPS, SYSTEMS, System
from safelight.cli.main import main as safelight
from safelight.generate import Generator
from safelight.model import Model
from safelight.spec import ModelSpec, UNetSpec, VAESpec
from safelight.store.single_file import detect
from store.original_files import original_file
from systems_micro import apart, drawing, latents_of

SAMPLERS = ("pndm", "ddim", "dpm")
SCALES = (1.0, 5.0)
LIMIT = 1e-4
"""Largest difference of latents, in units of the reference's largest value or of 1."""
RESULTS = parity.RESULTS
PAGE = Path(__file__).parents[1] / "docs" / "parity.md"
BEGIN, END = "<!-- systems: begin -->", "<!-- systems: end -->"

CHECKS = ("folder", "single", "micro", "exports")
Fault = Callable[[Model], None]


@dataclass
class Cell:
    """One check: what was found, or what is wrong."""

    ok: bool = False
    difference: float | None = None
    """Of latents, where the check has one."""
    tensors: int = 0
    problem: str = "not run"


@dataclass
class Row:
    """One system's checks."""

    system: str
    peer: str
    folder: Cell = field(default_factory=Cell)
    single: Cell = field(default_factory=Cell)
    micro: Cell = field(default_factory=Cell)
    exports: Cell = field(default_factory=Cell)
    seconds: float = 0.0

    @property
    def cells(self) -> dict[str, Cell]:
        return {name: getattr(self, name) for name in CHECKS}


# -- one system ---------------------------------------------------------------------------------


class Desk:
    """A system's pipeline, its folder, and the checks on them.

    Args:
        place: an empty folder to work in.
        fault: spoils every model that is loaded, to see that the checks find it.
    """

    def __init__(self, system: System, place: Path, fault: Fault = lambda model: None) -> None:
        self.system, self.place, self.fault = system, place, fault
        self.pipeline, self.saved = self.made(SAMPLERS[0])

    def made(self, sampler: str) -> tuple[Any, Path]:
        """The reference's pipeline, and the folder that it is saved in."""
        pipeline, folder = self.system.make(sampler), self.place / sampler
        pipeline.set_progress_bar_config(disable=True)
        if not folder.exists():
            pipeline.save_pretrained(folder)
            self.system.prepare(folder, pipeline)
        return pipeline, folder

    def load(self, path: Path, **options: Any) -> Model:
        model = Model.load(path, device="cpu", **options)
        self.fault(model)
        return model

    def theirs(self, pipeline: Any, model: Model, scale: float = SCALES[-1]) -> Tensor:
        """The reference's latents, from the noise that is ours."""
        asked = {**self.system.theirs, "num_inference_steps": STEPS, "guidance_scale": scale}
        with (
            pytest.MonkeyPatch.context() as patch,
            drawing(patch, *self.system.draws(model)),
        ):
            return pipeline(**asked, output_type="latent").images

    def ours(self, model: Model, scale: float = SCALES[-1]) -> Tensor:
        asked = {**self.system.ours, "steps": STEPS, "guidance_scale": scale, "seed": SEED}
        return latents_of(model, **asked)

    # -- the checks -----------------------------------------------------------------------------

    def folder(self) -> Cell:
        """Every tensor of the saved pipeline is in the loaded model."""
        model = self.load(self.saved)
        assert model.spec.family == self.system.preset.family, model.spec.family
        parts = {"unet": "unet", "vae": "vae", "text": "text_encoder", "vision": "image_encoder"}
        count = 0
        for name, net in model.networks.items():
            wanted = getattr(self.pipeline, parts[name]).state_dict()
            found = net.state_dict()
            count += same(found, flat(wanted, found), name)
        return Cell(True, tensors=count, problem="")

    def micro(self) -> Cell:
        """Latents agree: three samplers, guided and not; and verdicts, where there are any."""
        worst = 0.0
        for sampler in SAMPLERS:
            pipeline, folder = self.made(sampler)
            model = self.load(folder)
            for scale in SCALES:
                theirs = self.theirs(pipeline, model, scale)
                worst = max(worst, apart(self.ours(model, scale), theirs))
        if self.system.checked:
            same_verdicts(self.pipeline, self.load(self.saved))
        return judged(worst, LIMIT)

    def single(self) -> Cell:
        """The single file gives the reference's latents, and published ones are recognised."""
        recognised(self.system, self.place)
        model = self.load_single()
        theirs = self.theirs(self.pipeline, model)
        return judged(apart(self.ours(model), theirs), LIMIT)

    def exports(self) -> Cell:
        """diffusers' pipeline makes of our folders what it made of its own: exactly that."""
        out = [self.place / "exported"]
        run("models", "export", self.saved, out[0])
        if not self.has_prior():  # a single file is half of the chain
            out.append(self.place / "converted")
            run("models", "convert", self.single_file(), out[1], *self.tokenizer())
        worst, model = 0.0, self.load(self.saved)
        wanted = self.theirs(self.pipeline, model)
        for folder in out:
            others = self.system.beside if folder.name == "converted" else {}
            pipeline = self.system.peer.from_pretrained(folder, local_files_only=True, **others)
            pipeline.set_progress_bar_config(disable=True)
            worst = max(worst, apart(self.theirs(pipeline, model), wanted))
        if self.system.checked:
            same_verdicts(self.system.peer.from_pretrained(out[0]), model)
        self.load(out[0])
        return judged(worst, 0.0)

    # -- single files -----------------------------------------------------------------------------

    def has_prior(self) -> bool:
        return self.system.preset.prior is not None

    def tokenizer(self) -> list[Any]:
        place = self.saved / "tokenizer"
        return ["--tokenizer", place] if place.is_dir() else []

    def single_file(self) -> Path:
        path = self.place / "single.safetensors"
        if not path.exists():
            run("models", "convert", self.saved, path)
        return path

    def load_single(self) -> Model:
        options: dict[str, Any] = {}
        if self.tokenizer():
            options["tokenizer"] = self.tokenizer()[1]
        if self.has_prior():
            options["prior"] = self.original_prior()
        return self.load(self.single_file(), **options)

    def original_prior(self) -> Path:
        """The prior through its original file, beside its own text tower."""
        place = self.place / "karlo"
        (self.place / "part").mkdir()
        shutil.copytree(self.saved / "prior", self.place / "part" / "prior")
        run("models", "convert", self.place / "part", self.place / "prior.safetensors")
        run("models", "convert", self.place / "prior.safetensors", place)
        for name in ("text_encoder", "tokenizer"):
            shutil.copytree(self.saved / f"prior_{name}", place / name)
        return place


def check(
    system: System, fault: Fault = lambda model: None, names: tuple[str, ...] = CHECKS
) -> Row:
    """The checks of one system; what fails is told in its cell.

    Args:
        fault: spoils every model that is loaded.
        names: of the checks to make.
    """
    began = time.perf_counter()
    row = Row(system.name, system.peer.__name__)
    with tempfile.TemporaryDirectory(prefix="safelight-systems-") as place:
        desk = Desk(system, Path(place), fault)
        for name in names:
            try:
                cell = getattr(desk, name)()
            except Exception as error:
                traceback.print_exc()
                cell = Cell(problem=f"{type(error).__name__}: {str(error)[:200]}")
            setattr(row, name, cell)
    row.seconds = round(time.perf_counter() - began, 1)
    return row


def judged(difference: float, limit: float) -> Cell:
    ok = difference <= limit  # and not where it is no number
    return Cell(ok, difference, problem="" if ok else f"differs by {difference:.1e}")


def run(*arguments: Any) -> None:
    """A command of ours, as a user types it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            safelight([str(word) for word in arguments])
        except SystemExit as leaving:
            if leaving.code:
                raise RuntimeError(out.getvalue().strip()) from None


def flat(state: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers, whose tower's prefix depends on its version."""
    if set(state) == set(like):
        return state
    return {f"text_model.{name}": tensor for name, tensor in state.items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], name: str) -> int:
    """How many tensors; raises where one differs."""
    if set(found) != set(wanted):
        raise AssertionError(f"{name}: {sorted(set(found) ^ set(wanted))[:3]}")
    for key, tensor in wanted.items():
        if not torch.equal(found[key], tensor):
            raise AssertionError(f"{name}: {key} is another")
    return len(wanted)


def recognised(system: System, place: Path) -> None:
    """The published single file, by its tensors' names and shapes at full size."""
    found, _ = detect(original_file(system.preset, place, system.told))
    for part in ("family", "unet", "vae", "text", "vision"):
        if getattr(found, part) != getattr(system.preset, part):
            raise AssertionError(f"the published file is taken for another: {part}")
    if found.schedule.prediction_type != system.preset.schedule.prediction_type:
        raise AssertionError("the published file is taken for another: prediction type")


def same_verdicts(pipeline: Any, model: Model, count: int = 8) -> None:
    """The same pictures are flagged, and flagged ones are black, on both sides."""
    pipeline.set_progress_bar_config(disable=True)
    flags = []
    for seed in range(count):
        asked = {"prompt": f"abc {seed}", "width": 16, "height": 32}
        generator = torch.Generator().manual_seed(seed)
        theirs = pipeline(**asked, num_inference_steps=3, guidance_scale=5.0, generator=generator)
        (ours,) = Generator(model).generate(**asked, steps=3, guidance_scale=5.0, seed=seed)
        flags.append(bool(theirs.nsfw_content_detected[0]))
        black = ours.image.getextrema() == ((0, 0),) * 3
        if (ours.nsfw, black) != (flags[-1], theirs.images[0].getextrema() == ((0, 0),) * 3):
            raise AssertionError(f"seed {seed}: flagged {flags[-1]}, ours {ours.nsfw}")
    if len(set(flags)) < 2:
        raise AssertionError(f"all verdicts are {flags[0]}: nothing was compared")


# -- the table ------------------------------------------------------------------------------------


def newest(kind: str) -> list[dict[str, Any]]:
    """Kept results, the latest first."""
    paths = sorted(RESULTS.glob(f"{kind}-*.json"), key=lambda path: path.stem[-10:], reverse=True)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def full_size(preset: ModelSpec, kept: Iterable[dict[str, Any]]) -> str:
    """What ``benchmarks.parity`` found for a system's networks."""
    found: dict[str, float] = {}
    missing = []
    kept = list(kept)
    for part in parity.PARTS:
        spec = getattr(preset, part)
        if spec is None:
            continue
        rows = next(filter(None, (_measured(part, spec, data) for data in kept)), [])
        if not rows:
            missing.append(part)
        else:
            found[part] = max(max(tap["relative"] for tap in row["taps"]) for row in rows)
    worst = [f"{part} {value:.1e}" if value else f"{part} 0" for part, value in found.items()]
    cells = [", ".join(worst)] if worst else []
    return "; ".join([*cells, *([f"not run: {', '.join(missing)}"] if missing else [])])


def built(spec: Any) -> Any:
    """A network's spec without what changes nothing in its layers in float32."""
    if isinstance(spec, UNetSpec):
        return spec.replace(sample_size=0, upcast_attention=False)
    if isinstance(spec, VAESpec):
        return spec.replace(sample_size=0, force_float32=False)
    return spec


def _measured(part: str, spec: Any, data: dict[str, Any]) -> list[dict[str, Any]]:
    names = {
        name
        for name, model in parity.SYSTEMS.items()
        if (other := getattr(model, part)) is not None and built(other) == built(spec)
    }
    return [
        row
        for row in data["networks"]
        if row["part"].split()[0] == part and names & set(row["systems"])
    ]


def table(data: dict[str, Any], kept: Iterable[dict[str, Any]]) -> str:
    """The Markdown between the marks in docs/parity.md."""
    kept = list(kept)
    presets = {system.name: system.preset for system in SYSTEMS}
    lines = [
        "| system | diffusers' pipeline | loads its folder | loads its single file | agrees at "
        "micro size | networks at full size | exports |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["systems"]:
        cells = [
            row["system"],
            f"`{row['peer']}`",
            shown(row["folder"], f"yes, {row['folder']['tensors']} tensors"),
            shown(row["single"], "yes, {difference}"),
            shown(row["micro"], "{difference}"),
            full_size(presets[row["system"]], kept),
            shown(row["exports"], "yes, {difference}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    machine = data["machine"]
    lines += [
        "",
        f"Run on {data['date']}: {machine['cpu']}, torch {machine['torch']}, diffusers "
        f"{machine['diffusers']}, transformers {machine['transformers']}.",
    ]
    return "\n".join(lines)


def shown(cell: dict[str, Any], good: str) -> str:
    if not cell["ok"]:
        return f"**no**: {cell['problem'].replace('|', '/')}"
    found = cell["difference"]
    return good.replace("{difference}", "0" if not found else f"{found:.1e}")


def into_page(text: str, page: str) -> str:
    """The page with the table between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.systems", description=__doc__)
    parser.add_argument("--only", help="systems whose name has these words; nothing is written")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    given = parser.parse_args(arguments)
    if not given.table:
        diffusers.utils.logging.disable_progress_bar()
        diffusers.utils.logging.set_verbosity_error()  # its notice of every black picture
        transformers.utils.logging.disable_progress_bar()
        chosen = [s for s in SYSTEMS if given.only is None or given.only in s.name]
        rows = []
        for system in chosen:
            rows.append(check(system))
            wrong = {k: c.problem for k, c in rows[-1].cells.items() if not c.ok}
            print(f"{system.name}: {wrong or 'all well'} ({rows[-1].seconds} s)", flush=True)
        failed = any(not cell.ok for row in rows for cell in row.cells.values())
        if given.only is not None:
            return int(failed)
        machine = parity.machine()
        slug = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
        today = f"{datetime.date.today():%Y-%m-%d}"
        data = {
            "date": today,
            "machine": machine,
            "limit": LIMIT,
            "samplers": SAMPLERS,
            "guidance": SCALES,
            "systems": [asdict(row) for row in rows],
        }
        path = RESULTS / f"systems-{slug}-{today}.json"
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")
    data = newest("systems")[0]
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(into_page(table(data, newest("parity")), page), encoding="utf-8")
    return int(any(not row[name]["ok"] for row in data["systems"] for name in CHECKS))


if __name__ == "__main__":
    sys.exit(main())
