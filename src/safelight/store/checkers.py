"""A safety checker's folder, as published: config, weights, ``preprocessor_config.json``.

It lies inside a model's folder (``safety_checker/``, its input in ``feature_extractor/``), or
stands alone with all three in one place. Our own add :data:`NOTES_FILE`: the concepts' names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from safelight.errors import WeightsError
from safelight.spec import PictureSpec, SafetySpec
from safelight.store import configs
from safelight.store.components import find_weights, read_json
from safelight.store.weights import StateDict, read_weights, save_safetensors

NOTES_FILE = "safelight.json"
SCHEMA = 1
_INPUT = "preprocessor_config.json"


@dataclass(frozen=True)
class CheckerContents:
    """What a folder holds; no weights have been read yet.

    Attributes:
        path: where ``config.json`` is.
        tensors: under the names of :class:`safelight.nets.safety_head.SafetyHead`.
        notes: what was not taken as it stands, for people.
    """

    path: Path
    spec: SafetySpec
    tensors: StateDict
    notes: tuple[str, ...] = ()


def find_checker(path: Path) -> Path | None:
    """The checker's own folder in ``path``: a model's folder, or the checker's itself."""
    for place in (path / "safety_checker", path):
        if (place / "config.json").is_file() and find_weights(place)[0] is not None:
            return place
    return None


def read_checker(path: str | Path, variant: str | None = None) -> CheckerContents:
    """Read a checker's folder, or that of a model that has one.

    Raises:
        WeightsError: there is none, or it is of another kind.
    """
    place = find_checker(Path(path))
    if place is None:
        raise WeightsError(path, "holds no safety checker.", "It has config.json and weights.")
    config = read_json(place / "config.json")
    weights, _ = find_weights(place, variant)
    assert weights is not None
    tensors = read_weights(weights).renamed(_checker_name)
    shapes = {name: entry.shape for name, entry in tensors.entries.items()}
    if "concept_embeds" not in shapes or "special_care_embeds" not in shapes:
        raise WeightsError(weights, "has no concept_embeds: it is not a safety checker.")
    vision = configs.vision_spec(config, place / "config.json")
    pictures, notes = _pictures(Path(path), place, vision.image_size)
    own = read_json(place / NOTES_FILE) if (place / NOTES_FILE).is_file() else {}
    if own.get("schema", SCHEMA) > SCHEMA:
        raise WeightsError(place / NOTES_FILE, "is of a newer version.", "Update safelight.")
    concepts, special = shapes["concept_embeds"][0], shapes["special_care_embeds"][0]
    names = tuple(str(name) for name in own.get("names", ()))
    if names and len(names) != concepts + special:
        raise WeightsError(
            place / NOTES_FILE, f"names {len(names)} concepts of {concepts + special}."
        )
    spec = SafetySpec(
        vision=vision, pictures=pictures, concepts=concepts, special=special, names=names
    )
    return CheckerContents(place, spec, tensors, tuple(notes))


def write_checker(path: str | Path, spec: SafetySpec, state: Mapping[str, Tensor]) -> None:
    """Write a checker's folder, which ``diffusers`` and ``transformers`` load too."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    vision = configs.vision_config(spec.vision)
    config = {
        "architectures": ["StableDiffusionSafetyChecker"],
        "model_type": "clip",
        "projection_dim": spec.vision.projection_width,
        "text_config": {"num_hidden_layers": 1, "projection_dim": spec.vision.projection_width},
        "vision_config": {**vision, "architectures": None},
    }
    size = spec.pictures
    pictures = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": bool(size.resize),
        "size": {"shortest_edge": size.resize or size.crop},
        "resample": size.resample,
        "do_center_crop": bool(size.crop),
        "crop_size": {"height": size.crop, "width": size.crop},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(size.mean),
        "image_std": list(size.std),
    }
    _write(path / "config.json", config)
    _write(path / _INPUT, pictures)
    _write(path / NOTES_FILE, {"schema": SCHEMA, "names": list(spec.names)})
    save_safetensors(path / "model.safetensors", state)


def attach_checker(folder: str | Path, spec: SafetySpec, state: Mapping[str, Tensor]) -> None:
    """Write a checker into a model's folder, where ``diffusers`` looks for it."""
    folder = Path(folder)
    write_checker(folder / "safety_checker", spec, state)
    (folder / "feature_extractor").mkdir(exist_ok=True)
    (folder / "safety_checker" / _INPUT).replace(folder / "feature_extractor" / _INPUT)
    index = read_json(folder / "model_index.json")
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    _write(folder / "model_index.json", index)


def _checker_name(name: str) -> str | None:
    """transformers 5 leaves out the inner ``vision_model.``; old files hold a buffer."""
    if name.endswith("position_ids"):
        return None
    if name.startswith("vision_model.") and not name.startswith("vision_model.vision_model."):
        return f"vision_model.{name}"
    return name


def _pictures(path: Path, place: Path, size: int) -> tuple[PictureSpec, list[str]]:
    for file in (
        place / _INPUT,
        path / "feature_extractor" / _INPUT,
        place.parent / "feature_extractor" / _INPUT,
    ):
        if file.is_file():
            found = picture_spec(read_json(file), file)
            side = found.crop or size
            if side != size:
                raise WeightsError(file, f"cuts {side} pixels, the checker looks at {size}.")
            return found, []
    return PictureSpec(resize=size, crop=size), [
        "the safety checker has no feature_extractor: pictures go in as CLIP's do"
    ]


def picture_spec(config: Mapping[str, Any], file: Path) -> PictureSpec:
    """A ``CLIPImageProcessor`` config, or an old ``CLIPFeatureExtractor``'s with plain numbers.

    Raises:
        WeightsError: it does to pictures what CLIP's processors do not.
    """
    size, crop = config.get("size", 224), config.get("crop_size", 224)
    if isinstance(size, Mapping):
        size = size.get("shortest_edge")
    if isinstance(crop, Mapping):
        crop = crop.get("height") if crop.get("height") == crop.get("width") else None
    if not (isinstance(size, int) and isinstance(crop, int)) or not config.get("do_rescale", True):
        raise WeightsError(file, "does not resize the shorter side and cut a square, as CLIP does.")
    plain = not config.get("do_normalize", True)
    default = PictureSpec()
    mean = (0, 0, 0) if plain else config.get("image_mean", default.mean)
    std = (1, 1, 1) if plain else config.get("image_std", default.std)
    return PictureSpec(
        resize=size if config.get("do_resize", True) else 0,
        crop=crop if config.get("do_center_crop", True) else 0,
        resample=config.get("resample", 3),
        mean=cast(Any, tuple(mean)),
        std=cast(Any, tuple(std)),
    )


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
