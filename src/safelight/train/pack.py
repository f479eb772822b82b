"""From training runs to the shipped family: float16 weights, specs and digests.

    python -m safelight.train.pack clip runs/tiny/clip
    python -m safelight.train.pack vae runs/tiny/vae
    python -m safelight.train.pack unet runs/tiny/v1 --name tiny-v --guidance-scale 3

Towers, tokenizer and autoencoder are shared by every member, so each lies in the package once;
a member is its UNet and a ``model.json`` that names the files and their SHA-256.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safelight.data import stilllife
from safelight.model import FAMILY
from safelight.spec import ModelSpec, ScheduleSpec, TextSpec, UNetSpec, VAESpec, VisionSpec
from safelight.store.weights import read_weights, save_safetensors, sha256

SHARED = ("text", "vision", "vae")


def pack_shared(part: str, run: Path, family: Path = FAMILY) -> None:
    """Copy a frozen part (``clip`` or ``vae``) of a run into the family, as float16."""
    names = ("text", "vision") if part == "clip" else ("vae",)
    for name in names:
        _half(run / f"{name}.safetensors", family / "shared" / f"{name}.safetensors")
        shutil.copy(run / f"{name}.json", family / "shared" / f"{name}.json")
    if part == "clip":
        target = family / "shared" / "tokenizer"
        target.mkdir(parents=True, exist_ok=True)
        for file in (run / "tokenizer").iterdir():
            shutil.copy(file, target / file.name)


def pack_member(
    name: str, run: Path, *, guidance_scale: float, steps: int = 25, family: Path = FAMILY
) -> ModelSpec:
    """Add or replace a member: its UNet from a run, the rest shared.

    Returns:
        the member's spec, as written to its ``model.json``.
    """
    shared = family / "shared"
    schedule = ScheduleSpec.model_validate_json((run / "schedule.json").read_text())
    spec = ModelSpec(
        name=name,
        unet=UNetSpec.model_validate_json((run / "unet.json").read_text()),
        vae=VAESpec.model_validate_json((shared / "vae.json").read_text()),
        text=TextSpec.model_validate_json((shared / "text.json").read_text()),
        vision=VisionSpec.model_validate_json((shared / "vision.json").read_text()),
        schedule=schedule.replace(sampler="dpm++2m"),
        steps=steps,
        guidance_scale=guidance_scale,
        words=tuple(sorted(stilllife.vocabulary())),
    )
    _half(run / "unet.safetensors", family / name / "unet.safetensors")
    paths = {"unet": f"{name}/unet.safetensors"}
    paths |= {part: f"shared/{part}.safetensors" for part in SHARED}
    files: dict[str, dict[str, str]] = {
        part: {"path": path, "sha256": sha256(family / path)} for part, path in paths.items()
    }
    files["tokenizer"] = {"path": "shared/tokenizer"}
    record = {"spec": spec.model_dump(mode="json"), "files": files}
    (family / name / "model.json").write_text(json.dumps(record, indent=1) + "\n")
    return spec


def _half(source: Path, target: Path) -> None:
    tensors = read_weights(source)
    save_safetensors(target, {name: tensors[name].half() for name in tensors})


def main(arguments: list[str] | None = None) -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser(prog="python -m safelight.train.pack")
    parser.add_argument("part", choices=("clip", "vae", "unet"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", default="tiny-v")
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    options = parser.parse_args(arguments)
    if options.part == "unet":
        pack_member(options.name, options.run, guidance_scale=options.guidance_scale)
    else:
        pack_shared(options.part, options.run)


if __name__ == "__main__":
    main()
