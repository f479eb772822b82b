"""From training runs to the shipped family: float16 weights, specs and digests.

    python -m safelight.train.pack clip runs/tiny/clip
    python -m safelight.train.pack vae runs/tiny/vae
    python -m safelight.train.pack decoder runs/tiny/decoder
    python -m safelight.train.pack prior runs/tiny/prior --name tiny-prior
    python -m safelight.train.pack checker runs/tiny/safety --name tiny-safety
    python -m safelight.train.pack unet runs/tiny/v1 --name tiny-v --guidance-scale 3
    python -m safelight.train.pack unet runs/tiny/unclip --name tiny-unclip --prior tiny-prior

What a member was trained on (towers, tokenizer, autoencoder) is shared where it can be, so each
lies in the package once; a member is its UNet and a ``model.json`` that names the files and their
SHA-256. What the system is comes from the run's own manifest.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from safelight.data import stilllife
from safelight.errors import InvalidRequest
from safelight.presets import NOISE_AUGMENTATION, X4_NOISING
from safelight.shipped import FAMILY
from safelight.spec import (
    ModelSpec,
    PriorSpec,
    ScheduleSpec,
    TextSpec,
    UNetSpec,
    VAESpec,
    VisionSpec,
)
from safelight.store.checkers import read_checker
from safelight.store.weights import read_weights, save_safetensors, sha256

FAMILIES = {
    "text": "sd-v1",
    "variations": "image-variations",
    "unclip": "unclip",
    "inpaint": "inpaint",
    "depth": "depth",
    "x4": "x4-upscaler",
}
"""What a task makes of a UNet."""
_NOISING = {"unclip": NOISE_AUGMENTATION, "x4": X4_NOISING}
_FEW = 4  # steps of a consistency student


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


def pack_decoder(run: Path, family: Path = FAMILY) -> list[str]:
    """Copy a tiny decoder into the family, and name it in every member that has its autoencoder.

    Returns:
        those members' names.
    """
    _half(run / "tiny_decoder.safetensors", family / "shared" / "tiny_decoder.safetensors")
    shutil.copy(run / "tiny_decoder.json", family / "shared" / "tiny_decoder.json")
    told = []
    for card in sorted(family.glob("*/model.json")):
        record = json.loads(card.read_text())
        if record["files"]["vae"]["path"] == "shared/vae.safetensors":
            record["spec"] |= _decoder_spec(family)
            record["files"] |= _decoder_file(family)
            card.write_text(json.dumps(record, indent=1) + "\n")
            told.append(card.parent.name)
    return told


def _decoder_spec(family: Path) -> dict[str, Any]:
    card = family / "shared" / "tiny_decoder.json"
    return {"tiny_decoder": json.loads(card.read_text())} if card.is_file() else {}


def _decoder_file(family: Path) -> dict[str, dict[str, str]]:
    path = "shared/tiny_decoder.safetensors"
    if not (family / path).is_file():
        return {}
    return {"tiny_decoder": {"path": path, "sha256": sha256(family / path)}}


def _taught(name: str, teacher: Path, family: Path) -> None:
    """Name a student in its teacher's card, for ``--fast 3``."""
    card = family / teacher.name / "model.json"
    if card.is_file():
        record = json.loads(card.read_text())
        record["spec"]["student"] = name
        card.write_text(json.dumps(record, indent=1) + "\n")


def pack_prior(name: str, run: Path, family: Path = FAMILY) -> None:
    """Add or replace a prior, for an unCLIP member to name."""
    (family / name).mkdir(parents=True, exist_ok=True)
    _half(run / "prior.safetensors", family / name / "prior.safetensors")
    text = TextSpec.model_validate_json((family / "shared" / "text.json").read_text())
    spec = PriorSpec.model_validate_json((run / "prior.json").read_text()).replace(text=text)
    (family / name / "prior.json").write_text(spec.model_dump_json(indent=1) + "\n")


def pack_checker(name: str, folder: Path, family: Path = FAMILY) -> None:
    """Add or replace a safety checker that ``safelight safety build`` made with the family's CLIP;
    its vision tower is the shared one.

    Raises:
        InvalidRequest: it has another tower.
    """
    contents = read_checker(folder)
    shared = read_weights(family / "shared" / "vision.safetensors")
    own = {}
    for key, tensor in contents.tensors.items():
        twin = key.replace("vision_model.vision_model.", "vision_model.")
        if twin not in shared:
            own[key] = tensor
        elif not torch.equal(tensor.half(), shared[twin].half()):
            raise InvalidRequest("checker", f"{key} of {folder} is not the family's.")
    (family / name).mkdir(parents=True, exist_ok=True)
    save_safetensors(family / name / "concepts.safetensors", own)
    paths = {"vision": "shared/vision.safetensors", "concepts": f"{name}/concepts.safetensors"}
    files = {part: {"path": at, "sha256": sha256(family / at)} for part, at in paths.items()}
    record = {"spec": contents.spec.model_dump(mode="json"), "files": files}
    (family / name / "checker.json").write_text(json.dumps(record, indent=1) + "\n")


def pack_member(
    name: str,
    run: Path,
    *,
    guidance_scale: float,
    steps: int | None = None,
    prior: str | None = None,
    family: Path = FAMILY,
) -> ModelSpec:
    """Add or replace a member: its UNet from a run, the rest shared where it can be.

    Args:
        steps: default: 25, and 4 for a consistency student.
        prior: one of the family's, in front of an unCLIP model.

    Returns:
        the member's spec, as written to its ``model.json``.

    Raises:
        InvalidRequest: the run is of something else.
    """
    recipe = _recipe(run)
    settings = recipe["diffusion"]
    task = settings["task"]
    if prior is not None and task != "unclip":
        raise InvalidRequest("prior", f"{run} is of {task}.", "unCLIP has a use for one.")
    few = (recipe.get("distill") or {}).get("kind") == "consistency"
    shared, own = family / "shared", family / name
    own.mkdir(parents=True, exist_ok=True)
    parts = ["unet", "vae", "vision"] + ([] if task == "variations" else ["text"])
    paths = {part: f"shared/{part}.safetensors" for part in parts}

    def place(part: str, source: Path, file: str) -> None:
        _half(source, own / file)
        paths[part] = f"{name}/{file}"

    place("unet", run / "unet.safetensors", "unet.safetensors")
    vae = Path(settings["vae"])
    if vae.name != "shared":  # an autoencoder of its own
        place("vae", vae / "vae.safetensors", "vae.safetensors")
    if task == "unclip":
        place("image_normalizer", run / "normaliser.safetensors", "normaliser.safetensors")
    ahead = None
    if prior is not None:
        paths["prior"] = f"{prior}/prior.safetensors"
        ahead = PriorSpec.model_validate_json((family / prior / "prior.json").read_text())
    schedule = ScheduleSpec.model_validate_json((run / "schedule.json").read_text())
    text = TextSpec.model_validate_json((shared / "text.json").read_text())
    spec = ModelSpec(
        name=name,
        family=FAMILIES[task],
        unet=UNetSpec.model_validate_json((run / "unet.json").read_text()),
        vae=VAESpec.model_validate_json((vae / "vae.json").read_text()),
        text=text if "text" in paths else None,
        vision=VisionSpec.model_validate_json((shared / "vision.json").read_text()),
        prior=ahead,
        schedule=schedule.replace(sampler="lcm" if few else "dpm++2m"),
        noising=_NOISING.get(task),
        steps=steps or (_FEW if few else 25),
        guidance_scale=guidance_scale,
        words=tuple(sorted(stilllife.vocabulary())) if "text" in paths else (),
    )
    files: dict[str, dict[str, str]] = {
        part: {"path": path, "sha256": sha256(family / path)} for part, path in paths.items()
    }
    files["tokenizer"] = {"path": "shared/tokenizer"}
    if paths["vae"] == "shared/vae.safetensors":
        spec = spec.model_validate({**spec.model_dump(), **_decoder_spec(family)})
        files |= _decoder_file(family)
    if few:
        _taught(name, Path(recipe["distill"].get("teacher", "")), family)
    record = {"spec": spec.model_dump(mode="json"), "files": files}
    (own / "model.json").write_text(json.dumps(record, indent=1) + "\n")
    return spec


def _recipe(run: Path) -> dict[str, Any]:
    try:
        recipe = json.loads((run / "manifest.json").read_text())["recipe"]
    except (OSError, ValueError, KeyError) as error:
        raise InvalidRequest("run", f"{run} has no manifest: {error}.") from None
    if not recipe.get("diffusion"):
        raise InvalidRequest("run", f"{run} trained no UNet.", "Pack it as clip, vae or prior.")
    return recipe


def _half(source: Path, target: Path) -> None:
    tensors = read_weights(source)
    save_safetensors(target, {name: tensors[name].half() for name in tensors})


def main(arguments: list[str] | None = None) -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser(prog="python -m safelight.train.pack")
    parser.add_argument("part", choices=("clip", "vae", "decoder", "prior", "checker", "unet"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", default="tiny-v")
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--steps", type=int, help="default: 25; 4 for a consistency student")
    parser.add_argument("--prior", help="the family's, in front of an unCLIP model")
    options = parser.parse_args(arguments)
    if options.part == "unet":
        pack_member(
            options.name,
            options.run,
            guidance_scale=options.guidance_scale,
            steps=options.steps,
            prior=options.prior,
        )
    elif options.part == "decoder":
        pack_decoder(options.run)
    elif options.part in ("prior", "checker"):
        pack = pack_prior if options.part == "prior" else pack_checker
        pack(options.name, options.run)
    else:
        pack_shared(options.part, options.run)


if __name__ == "__main__":
    main()
