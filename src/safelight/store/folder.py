"""The published folder layout: ``model_index.json`` and one folder a component."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from pydantic import ValidationError
from torch import Tensor

from safelight.errors import VariantNotFound, WeightsError
from safelight.presets import NOISE_AUGMENTATION, X4_NOISING
from safelight.spec import (
    CLIP_MEAN,
    CLIP_STD,
    ModelSpec,
    ScheduleSpec,
    TextSpec,
    UNetSpec,
    VAESpec,
    VisionSpec,
)
from safelight.store import configs, schedulers
from safelight.store.components import read_component, read_json, variants
from safelight.store.weights import StateDict, save_safetensors, sha256

log = logging.getLogger(__name__)

NOTES_FILE = "safelight.json"
SCHEMA = 1
# Written as ``_diffusers_version``: the layout is that of this version. A number below 0.9
# would make readers "repair" small sample sizes.
_LAYOUT_VERSION = "0.36.0"
# Digests of smaller folders are checked on every load; of larger ones when asked for.
_ALWAYS_VERIFY = 256 * 2**20
# Components whose name in a spec, and in code, is not that of their folder.
_FOLDERS = {"text": "text_encoder", "vision": "image_encoder"}
_PARTS = {folder: part for part, folder in _FOLDERS.items()}
_NETWORKS = ("unet", "vae", "text", "vision")
# Pipelines of the reference that set steps_offset to 1 and clip_sample to false on loading.
_FIXING_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionImageEmbedPipeline",
)
_PIPELINES = {
    "sd-v1": "StableDiffusionPipeline",
    "sd-v2": "StableDiffusionPipeline",
    "image-variations": "StableDiffusionImageVariationPipeline",
    "unclip": "StableUnCLIPImg2ImgPipeline",
    "inpaint": "StableDiffusionInpaintPipeline",
    "depth": "StableDiffusionDepth2ImgPipeline",
    "x4-upscaler": "StableDiffusionUpscalePipeline",
}
_LIBRARIES = {
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text": ("transformers", "CLIPTextModel"),
    "vision": ("transformers", "CLIPVisionModelWithProjection"),
    "safety_checker": ("stable_diffusion", "StableDiffusionSafetyChecker"),
    "image_normalizer": ("stable_diffusion", "StableUnCLIPImageNormalizer"),
}
# steps, guidance scale of each family's card
_CARD_DEFAULTS = {"unclip": (20, 10.0), "x4-upscaler": (75, 9.0)}
_X4_SCALING = 0.08333
# The component that says the schedule of the noise on the picture that is looked at
_NOISING = ("image_noising_scheduler", "low_res_scheduler")
NOISING = {"unclip": NOISE_AUGMENTATION, "x4-upscaler": X4_NOISING}
"""Of the picture that is looked at, where the files do not say."""


class Saves(Protocol):
    """What can write itself into a folder: a tokenizer."""

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class FolderContents:
    """What a folder holds; no weights have been read yet.

    Attributes:
        path: the folder.
        spec: what the networks are and how the card samples.
        tensors: by component (``unet vae text vision``, and others under their published names:
            ``safety_checker`` …), each under the names that :mod:`safelight.nets` uses.
        tokenizer: the tokenizer's folder, for :class:`safelight.text.tokenizer.Tokenizer`.
        configs: raw configs of the components that have no spec.
        notes: what was not taken as it stands, for people.
    """

    path: Path
    spec: ModelSpec
    tensors: dict[str, StateDict]
    tokenizer: Path | None = None
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_folder(
    path: str | Path, variant: str | None = None, *, verify: bool | None = None
) -> FolderContents:
    """Read a published model folder.

    Args:
        path: the folder with ``model_index.json``.
        variant: ``fp16``, ``non_ema`` …; a component without it falls back to its plain file
            with a note.
        verify: check the digests that :func:`write_folder` left. None: where that is cheap.

    Raises:
        WeightsError: a file is missing, broken, of another family, or no component has the
            variant. Nothing has been loaded then.
    """
    path = Path(path)
    index = read_json(path / "model_index.json")
    own = read_json(path / NOTES_FILE) if (path / NOTES_FILE).is_file() else {}
    if own.get("schema", SCHEMA) > SCHEMA:
        raise WeightsError(path / NOTES_FILE, "is of a newer version.", "Update safelight.")
    parts = {
        name: value[1]
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] is not None
    }
    pipeline = str(index.get("_class_name", ""))
    _check_family(path / "model_index.json", pipeline, parts)
    places = {name: _place(path, name, own) for name in parts}
    _verify(path, own, verify)

    notes: list[str] = []
    specs: dict[str, Any] = {}
    tensors: dict[str, StateDict] = {}
    raw: dict[str, dict[str, Any]] = {}
    used: set[str | None] = set()
    for folder, place in places.items():
        name = _PARTS.get(folder, folder)
        if name not in _NETWORKS and not place.is_dir():
            notes.append(f"{name} is named by model_index.json but is not there")
            continue
        spec, state, of = read_component(place, name, variant)
        if spec is not None:
            specs[name] = spec
        if state is not None:
            tensors[name] = state
            used.add(of)
            if of != variant:
                notes.append(
                    f"{name}: no {variant or 'plain'} weights, using {of or 'the plain ones'}"
                )
        if name not in _NETWORKS:
            for file in ("config.json", "scheduler_config.json", "preprocessor_config.json"):
                if (place / file).is_file():
                    raw[name] = read_json(place / file)
    if variant is not None and variant not in used:
        there = sorted({v for place in places.values() for v in variants(place)})
        raise VariantNotFound(
            path, f"has no variant {variant!r}.", f"Variants there: {', '.join(there) or 'none'}."
        )

    schedule = ScheduleSpec()
    if "scheduler" in raw:
        fixes = pipeline in _FIXING_PIPELINES
        file = places["scheduler"] / "scheduler_config.json"
        schedule, more = schedulers.schedule_spec(raw["scheduler"], file, pipeline_fixes=fixes)
        notes += more
    noising = None
    for name in _NOISING:
        if name in raw:
            file = places[name] / "scheduler_config.json"
            noising, _ = schedulers.schedule_spec(raw[name], file, pipeline_fixes=False)
    tokenizer = places.get("tokenizer")
    if tokenizer is not None and not tokenizer.is_dir():
        tokenizer = None
    text = specs.get("text")
    if text is not None and tokenizer is not None:
        specs["text"] = text.replace(**special_ids(tokenizer))
    elif text is not None:
        notes.append("no tokenizer")
    for note in notes:
        log.warning("%s: %s", path, note)
    return FolderContents(
        path=path,
        spec=_model_spec(path, specs, schedule, noising, own),
        tensors=tensors,
        tokenizer=tokenizer,
        configs=raw,
        notes=tuple(notes),
    )


def write_folder(
    path: str | Path,
    spec: ModelSpec,
    state_dicts: Mapping[str, Mapping[str, Tensor]],
    tokenizer: Saves | None = None,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    shared: Mapping[str, str] | None = None,
    component_configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a complete folder that ``diffusers`` loads, and that :func:`read_folder` reads.

    Args:
        path: the folder; made. ``model_index.json`` is written last.
        spec: what the networks are.
        state_dicts: by component, named as in :class:`FolderContents`; ``unet`` and ``vae`` at
            least, unless shared. Without an ``image_normalizer`` unCLIP gets one that changes
            nothing. A prior goes in front with :func:`safelight.store.prior.attach_prior`.
        tokenizer: has ``save(folder)``; needed where the model reads text.
        dtype: floating-point tensors are converted to it; None keeps theirs.
        variant: infix of the weights files' names.
        shared: components that lie in a sibling folder, as paths relative to ``path``
            (``{"vae": "../tiny/vae"}``). Only this package reads such folders.
        component_configs: configs of components without a spec (``safety_checker``).

    Raises:
        ValueError: a component that the spec asks for is missing.
    """
    path = Path(path)
    shared = shared or {}
    given = {*state_dicts, *shared}
    needed = {"unet", "vae"} | ({"text"} if spec.text else set())
    if missing := needed - given:
        raise ValueError(f"write_folder needs the weights of {', '.join(sorted(missing))}")
    path.mkdir(parents=True, exist_ok=True)
    own_configs: dict[str, dict[str, Any]] = {
        "unet": configs.unet_config(spec.unet),
        "vae": configs.vae_config(spec.vae),
        **({"text": configs.text_config(spec.text)} if spec.text else {}),
        **({"vision": configs.vision_config(spec.vision)} if spec.vision else {}),
        **{name: dict(config) for name, config in (component_configs or {}).items()},
    }
    if spec.family == "unclip":
        state_dicts = {"image_normalizer": _no_statistics(spec), **state_dicts}
        given.add("image_normalizer")
        own_configs["image_normalizer"] = {
            "_class_name": "StableUnCLIPImageNormalizer",
            "embedding_dim": spec.unet.class_embedding_size // 2,
        }
    digests: dict[str, str] = {}
    for name, state in state_dicts.items():
        place = path / _FOLDERS.get(name, name)
        if name in own_configs:
            write_json(place / "config.json", _stamped(own_configs[name]))
        other = name in ("text", "vision", "safety_checker")
        stem = "model" if other else "diffusion_pytorch_model"
        file = place / f"{stem}{'.' + variant if variant else ''}.safetensors"
        kept = None if name == "image_normalizer" else dtype  # two rows of statistics
        save_safetensors(file, converted(state, kept))
        digests[file.relative_to(path).as_posix()] = sha256(file)

    index: dict[str, Any] = {
        "_class_name": _PIPELINES.get(spec.family, "StableDiffusionPipeline"),
        "_diffusers_version": _LAYOUT_VERSION,
    }
    for name in sorted(given):
        index[_FOLDERS.get(name, name)] = list(_LIBRARIES.get(name, ("diffusers", name)))
    scheduler = schedulers.scheduler_config(spec.schedule)
    write_json(path / "scheduler" / "scheduler_config.json", _stamped(scheduler))
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    if tokenizer is not None:
        tokenizer.save(path / "tokenizer")
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    _write_extras(path, spec, index)
    own = {
        "schema": SCHEMA,
        "name": spec.name,
        "family": spec.family,
        "steps": spec.steps,
        "guidance_scale": spec.guidance_scale,
        "words": list(spec.words),
        "sha256": digests,
        "shared": {_FOLDERS.get(name, name): place for name, place in shared.items()},
    }
    write_json(path / NOTES_FILE, own)
    write_json(path / "model_index.json", index)


def copy_parts(source: Path, target: Path, names: Sequence[str]) -> None:
    """Components that are another library's (a depth estimator) go along as they lie there."""
    if not (source / "model_index.json").is_file():
        return
    there, index = (dict(read_json(place / "model_index.json")) for place in (source, target))
    for name in names:
        if name in there and (source / name).is_dir():
            shutil.copytree(source / name, target / name)
            index[name] = there[name]
    write_json(target / "model_index.json", index)


def _check_family(file: Path, pipeline: str, parts: Mapping[str, str]) -> None:
    if "unet" in parts and "vae" in parts and "text_encoder_2" not in parts:
        return
    what = f"is a {pipeline}" if pipeline else "names no pipeline"
    raise WeightsError(
        file,
        f"{what} with the components {', '.join(sorted(parts)) or '(none)'}, which is not of the "
        "Stable Diffusion 1 and 2 family.",
    )


def _place(path: Path, name: str, own: Mapping[str, Any]) -> Path:
    """A component's folder, which a folder of ours may share with its siblings."""
    other = own.get("shared", {}).get(name)
    if other is None:
        return path / name
    place = Path(os.path.normpath(path.absolute() / other))
    if not place.is_relative_to(path.absolute().parent):
        raise WeightsError(path / NOTES_FILE, f"shares {name} with {other}, outside its siblings.")
    return place


def _verify(path: Path, own: Mapping[str, Any], verify: bool | None) -> None:
    digests = own.get("sha256", {})
    files = {path / name: digest for name, digest in digests.items()}
    present = {file: digest for file, digest in files.items() if file.is_file()}
    if verify is None:
        verify = sum(file.stat().st_size for file in present) <= _ALWAYS_VERIFY
    for file, digest in present.items() if verify else ():
        if sha256(file) != digest:
            raise WeightsError(
                file, f"does not have the SHA-256 that {NOTES_FILE} promises.", "Fetch it again."
            )


def special_ids(tokenizer: Path) -> dict[str, int]:
    """Ids of start, end and padding, which the text tower's published config often has wrong."""
    if (tokenizer / "vocab.json").is_file():
        vocab = read_json(tokenizer / "vocab.json")
    elif (tokenizer / "tokenizer.json").is_file():
        content = read_json(tokenizer / "tokenizer.json")
        vocab = cast(dict[str, int], content.get("model", {}).get("vocab", {}))
    else:
        raise WeightsError(tokenizer, "holds neither vocab.json nor tokenizer.json.")
    named: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (tokenizer / file).is_file():
            named |= read_json(tokenizer / file)
    defaults = {
        "bos": "<|startoftext|>",
        "eos": "<|endoftext|>",
        "pad": "<|endoftext|>",
    }
    ids = {}
    for key, default in defaults.items():
        token = named.get(f"{key}_token") or default
        token = token["content"] if isinstance(token, dict) else token
        if token not in vocab:
            raise WeightsError(tokenizer, f"lacks the token {token!r} that it names as {key}.")
        ids[f"{key}_id"] = vocab[token]
    return ids


def family_of(unet: UNetSpec, vae: VAESpec, text: TextSpec | None) -> str:
    """Which member of the family a set of networks is."""
    if unet.class_embedding == "projection":
        return "unclip"
    if unet.class_embedding == "table" or unet.in_channels == 7:
        return "x4-upscaler"
    if text is None:
        return "image-variations"
    if unet.in_channels == 2 * vae.latent_channels + 1:
        return "inpaint"
    if unet.in_channels == vae.latent_channels + 1:
        return "depth"
    return "sd-v2" if unet.linear_projection else "sd-v1"


def _model_spec(
    path: Path,
    specs: Mapping[str, Any],
    schedule: ScheduleSpec,
    noising: ScheduleSpec | None,
    own: Mapping[str, Any],
) -> ModelSpec:
    unet: UNetSpec = specs["unet"]
    text: TextSpec | None = specs.get("text")
    vision: VisionSpec | None = specs.get("vision")
    family = own.get("family") or family_of(unet, specs["vae"], text)
    vae: VAESpec = specs["vae"]
    if family == "x4-upscaler" and own.get("family") is None:
        vae = vae.replace(scaling_factor=_X4_SCALING)  # as its pipeline does
    steps, guidance = _CARD_DEFAULTS.get(family, (50, 7.5))
    if text is not None and text.width != unet.context_width:
        raise WeightsError(
            path,
            f"its text encoder is {text.width} wide but its UNet reads {unet.context_width}: "
            "they are of different models.",
        )
    try:
        return ModelSpec(
            name=own.get("name") or path.resolve().name,
            family=family,
            unet=unet,
            vae=vae,
            text=text,
            vision=vision,
            schedule=schedule,
            noising=noising or NOISING.get(family),
            steps=own.get("steps", steps),
            guidance_scale=own.get("guidance_scale", guidance),
            words=tuple(own.get("words", ())),
        )
    except ValidationError as error:
        raise WeightsError(path / NOTES_FILE, str(error.errors()[0]["msg"])) from error


def _no_statistics(spec: ModelSpec) -> dict[str, Tensor]:
    width = spec.unet.class_embedding_size // 2
    return {"mean": torch.zeros(1, width), "std": torch.ones(1, width)}


def _write_extras(path: Path, spec: ModelSpec, index: dict[str, Any]) -> None:
    """Components without weights, which the reference's pipelines ask for, and their nulls."""
    nothing = [None, None]
    if spec.family in ("sd-v1", "sd-v2", "inpaint"):
        index["requires_safety_checker"] = False
        for name in ("safety_checker", "feature_extractor", "image_encoder"):
            index.setdefault(name, nothing)
    elif spec.family == "x4-upscaler":
        index["max_noise_level"] = 350
        _write_scheduler(path, "low_res_scheduler", spec.noising or X4_NOISING, index)
    elif spec.family == "depth":
        index.setdefault("depth_estimator", nothing)
        index.setdefault("feature_extractor", nothing)
    elif spec.family == "unclip":
        noising = spec.noising or NOISE_AUGMENTATION
        _write_scheduler(path, "image_noising_scheduler", noising, index)
    if spec.family == "image-variations":
        index.setdefault("safety_checker", nothing)
    if spec.vision and spec.family in ("image-variations", "unclip"):
        size = spec.vision.image_size
        preprocessor = {
            "image_processor_type": "CLIPImageProcessor",
            "crop_size": {"height": size, "width": size},
            "size": {"shortest_edge": size},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
        }
        write_json(path / "feature_extractor" / "preprocessor_config.json", preprocessor)
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]


def _write_scheduler(path: Path, name: str, spec: ScheduleSpec, index: dict[str, Any]) -> None:
    config = schedulers.scheduler_config(spec)
    write_json(path / name / "scheduler_config.json", _stamped(config))
    index[name] = ["diffusers", config["_class_name"]]


def _stamped(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "_diffusers_version": _LAYOUT_VERSION} if "_class_name" in config else config


def converted(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> StateDict:
    """Its floating-point tensors as ``dtype`` when they are read; None keeps theirs."""
    source = StateDict.of(state)
    return source.replace({name: entry.cast(dtype) for name, entry in source.entries.items()})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Sorted and indented, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
