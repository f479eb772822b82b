"""``safelight doctor``: this machine, or a model's files."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import safelight
from safelight import presets
from safelight.cli import show
from safelight.cli.info import describe
from safelight.errors import SafelightError, WeightsError
from safelight.spec import Record

if TYPE_CHECKING:
    from safelight.generate import Generator

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "pillow", "pydantic", "huggingface_hub")
OPTIONAL = ("accelerate", "tensorboard", "diffusers", "transformers")
INSTRUCTIONS = {0: "portable", 1: "AVX2", 2: "AVX-512"}
TESTED = {("cpu", "float32"), ("cpu", "bfloat16")}
"""Where the test suite or a benchmark of this version ran."""
# (tensors, parameters) of the published files, by what they are.
PUBLISHED: dict[tuple[str, Record], tuple[str, int, int]] = {
    ("unet", presets.SD_V1.unet): ("SD 1.x", 686, 859_520_964),
    ("unet", presets.SD_SMALL.unet): ("small SD", 442, 579_384_964),
    ("unet", presets.SD_V2_BASE.unet): ("SD 2.x base", 686, 865_910_724),
    ("unet", presets.SD_V2_768.unet): ("SD 2.x 768-v", 686, 865_910_724),
    ("vae", presets.SD_V1.vae): ("SD", 248, 83_653_863),
    ("vae", presets.SD_V2_768.vae): ("SD 768", 248, 83_653_863),
    ("text", presets.CLIP_L_TEXT): ("CLIP ViT-L/14", 196, 123_060_480),
    ("text", presets.OPENCLIP_H_TEXT): ("OpenCLIP ViT-H/14", 372, 340_387_840),
}


def command(
    model: Annotated[
        str | None, typer.Argument(help="A shipped name, a folder, a file or a hub id.")
    ] = None,
    agreement: Annotated[
        bool,
        typer.Option(
            "--agreement/--no-agreement", help="Compare a picture with diffusers', if installed."
        ),
    ] = True,
    steps: Annotated[
        int, typer.Option("--steps", min=1, max=100, help="Steps of that picture.")
    ] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Check this machine; or count a model's tensors and compare it with diffusers."""
    report = _machine() if model is None else _model(model, steps if agreement else 0)
    if as_json:
        show.document(report)
    else:
        typer.echo(_machine_words(report) if model is None else _model_words(report))
    if report["problems"]:
        raise SafelightError("; ".join(report["problems"]))


# -- the machine --------------------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    import torch

    from safelight import shipped
    from safelight.model import Model
    from safelight.runtime import explain
    from safelight.runtime.kernels import library, winograd

    problems, weights = [], {}
    for name in shipped.names():
        try:
            weights[name] = Model.load(name, device="cpu").digest
        except WeightsError as error:
            weights[name] = None
            problems.append(str(error))
    compiler = next((c for c in ("cc", "gcc", "clang", "cl") if shutil.which(c)), None)
    return {
        "schema": 1,
        "safelight": safelight.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": _memory(),
        "packages": {name: _version(name) for name in (*PACKAGES, *OPTIONAL)},
        "compiler": compiler,
        "kernels": library() is not None,
        "instructions": INSTRUCTIONS.get(winograd.level()),
        "layouts": explain(),
        "offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"),
        "weights": weights,
        "devices": devices(),
        "problems": problems,
    }


def devices() -> list[dict[str, Any]]:
    """Each device and number format: tested, expected or emulated, and whether it is here."""
    import torch

    from safelight.model import EMULATED, is_emulated

    here = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    rows = []
    for device, present in here.items():
        for dtype in ("float32", "float16", "bfloat16"):
            word, why = "tested" if (device, dtype) in TESTED else "expected", ""
            if is_emulated(dtype, torch.device(device)):
                word, why = "emulated", EMULATED
            rows.append(
                {"device": device, "dtype": dtype, "state": word, "here": present, "why": why}
            )
    return rows


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None  # Windows


def _machine_words(report: dict[str, Any]) -> str:
    memory = report["memory"]
    lines = [
        f"safelight {report['safelight']}, Python {report['python']}, {report['system']}",
        f"cpu       {report['cpu']}, {report['cores']} cores, {report['threads']} threads"
        + (f", {memory / 2**30:.1f} GiB" if memory else ""),
        "packages  " + ", ".join(f"{n} {v}" for n, v in report["packages"].items() if v),
        "absent    " + (", ".join(n for n, v in report["packages"].items() if not v) or "nothing"),
        f"kernels   {_kernel_words(report)}",
        *(
            f"layout    {name}: {f'off, {why}' if why else 'on'}"
            for name, why in report["layouts"].items()
        ),
        f"network   {'off (HF_HUB_OFFLINE)' if report['offline'] else 'only when a hub id asks'}",
    ]
    for name, digest in report["weights"].items():
        lines.append(f"weights   {name} {'whole, ' + digest[:10] if digest else 'DAMAGED'}")
    lines += ["", "device  number    state     here"]
    for row in report["devices"]:
        lines.append(
            f"{row['device']:7} {row['dtype']:9} {row['state']:9} "
            f"{'yes' if row['here'] else 'no':4} {row['why']}".rstrip()
        )
    return "\n".join(lines)


def _kernel_words(report: dict[str, Any]) -> str:
    if report["kernels"]:
        return f"compiled, {report['instructions']}"
    if report["compiler"] is None:
        return "none, torch does all the work: install a C compiler, then Safelight again"
    return f"none, torch does all the work: install Safelight again ({report['compiler']} is here)"


# -- a model ------------------------------------------------------------------------------------


def _model(name: str, steps: int) -> dict[str, Any]:
    report = {**describe(name), "plan": _plan(name)}  # loading has checked every name and shape
    problems = []
    specs = {part: _spec(report["spec"], part) for part in report["networks"]}
    for part, holds in report["networks"].items():
        known = PUBLISHED.get((part, specs[part]))
        holds["published"] = known[0] if known else None
        if known and (holds["tensors"], holds["parameters"]) != known[1:]:
            problems.append(f"{part}: {known[0]} has {known[1]} tensors, {known[2]:,} parameters")
    report["agreement"] = _agreement(name, steps) if steps else None
    found = report["agreement"] or {}
    if found.get("mean", 0) > 1:
        problems.append(f"diffusers makes another picture: mean difference {found['mean']:.2f}/255")
    return {**report, "problems": problems}


def _plan(name: str) -> list[str]:
    """The layouts and fusions with which the model runs on this machine's processor."""
    from safelight.model import Model
    from safelight.runtime import named

    model = Model.load(name, device="cpu", dtype="float32")
    return list(named(model, model.plan).kernels)


def _spec(spec: dict[str, Any], part: str) -> Record:
    from safelight.spec import ModelSpec

    return getattr(ModelSpec.model_validate(spec), part)


def _agreement(name: str, steps: int) -> dict[str, Any] | None:
    """One picture by us and by diffusers, from the same latents; None without diffusers."""
    if _version("diffusers") is None or _version("transformers") is None:
        return None
    from safelight.generate import load

    generator = load(name, device="cpu", dtype="float32")
    if generator.model.text is None or generator.model.spec.family not in ("sd-v1", "sd-v2"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        return _compare(generator, Path(folder), steps)


def _compare(generator: Generator, folder: Path, steps: int) -> dict[str, Any]:
    import numpy as np
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging
    from PIL import Image

    from safelight import provenance
    from safelight.cli.models import write
    from safelight.diffusion.noise import initial_noise

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, prompt = generator.model, "a red cube"
    write(model, folder / "model")
    pipe = StableDiffusionPipeline.from_pretrained(
        folder / "model", safety_checker=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    ours = generator.generate(prompt, seed=0, steps=steps)[0]
    if ours.image is None:
        raise SafelightError(f"no picture to compare: {ours.outcome}: {ours.message}")
    cells = model.spec.unet.sample_size
    latents = initial_noise(0, (1, model.spec.vae.latent_channels, cells, cells))
    pixels: Any = pipe(
        prompt,
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=model.spec.guidance_scale,
        height=model.spec.native_size,
        width=model.spec.native_size,
        output_type="np",
    )
    theirs = Image.fromarray((pixels.images[0] * 255).round().astype(np.uint8))
    difference = provenance.compare(theirs, ours.image)
    return {
        "diffusers": _version("diffusers"),
        "steps": steps,
        "sampler": model.spec.schedule.sampler,
        "largest": difference.largest,
        "mean": difference.mean,
        "equal": difference.equal,
    }


def _model_words(report: dict[str, Any]) -> str:
    lines = [f"{report['name']} ({report['family']}) from {report['source']}"]
    for part, holds in report["networks"].items():
        known = f", as {holds['published']}" if holds["published"] else ""
        lines.append(
            f"{part:9} {holds['tensors']:5} tensors, {holds['parameters']:>13,} parameters{known}"
        )
    lines.append(f"plan      {', '.join(report['plan'])}")
    found = report["agreement"]
    if found is None:
        lines.append("agreement not measured")
    else:
        lines.append(
            f"agreement with diffusers {found['diffusers']}, {found['steps']} steps of "
            f"{found['sampler']}: largest difference {found['largest']}/255, "
            f"mean {found['mean']:.4f}/255"
        )
    lines += [f"note      {note}" for note in report["notes"]]
    return "\n".join(lines)
