"""Single parts of a model, by folder: what training stages and evaluation hand each other.

A folder is a training run's (``unet.json``, ``unet.safetensors``, ``schedule.json`` …), or one of
the shipped family's (``family/shared``, ``family/tiny-v``), so that a run can start warm from
what was shipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from safelight.errors import WeightsError
from safelight.nets.clip import TextTower, VisionTower
from safelight.nets.tiny_decoder import TinyDecoder, plain_keys, spec_of
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.spec import (
    CLIP_MEAN,
    CLIP_STD,
    ModelSpec,
    Record,
    ScheduleSpec,
    TextSpec,
    TinyDecoderSpec,
    UNetSpec,
    VAESpec,
    VisionSpec,
)
from safelight.store.weights import load_into, read_weights
from safelight.text.tokenizer import Tokenizer

Spec = TypeVar("Spec", bound=Record)
Module = TypeVar("Module", bound=nn.Module)


def builders(spec: ModelSpec) -> dict[str, Callable[[], nn.Module]]:
    """What makes each network of a system, by component name; weights come later."""
    found: dict[str, Callable[[], nn.Module]] = {
        "unet": lambda: UNet(spec.unet),
        "vae": lambda: VAE(spec.vae),
    }
    if spec.text is not None:
        text = spec.text
        found["text"] = lambda: TextTower(text)
    if spec.vision is not None:
        vision = spec.vision
        found["vision"] = lambda: VisionTower(vision)
    if spec.tiny_decoder is not None:
        decoder = spec.tiny_decoder
        found["tiny_decoder"] = lambda: TinyDecoder(decoder)
    return found


def load_text(folder: Path) -> tuple[TextTower, Tokenizer]:
    """Text tower and tokenizer of a CLIP's folder."""
    tower = TextTower(_spec(folder / "text.json", TextSpec))
    return _filled(tower, folder / "text.safetensors"), Tokenizer.from_folder(folder / "tokenizer")


def load_vision(folder: Path) -> VisionTower:
    """Vision tower of a CLIP's folder."""
    tower = VisionTower(_spec(folder / "vision.json", VisionSpec))
    return _filled(tower, folder / "vision.safetensors")


def load_vae(folder: Path) -> VAE:
    """The autoencoder of a folder."""
    return _filled(VAE(_spec(folder / "vae.json", VAESpec)), folder / "vae.safetensors")


def load_tiny_decoder(place: Path) -> TinyDecoder:
    """A tiny decoder from a file in TAESD's layout (its author's or ``AutoencoderTiny``'s),
    or from a folder with one. A run's folder says beside it how its latents are scaled.

    Raises:
        WeightsError: there is none, or its weights are not one's.
    """
    names = ("tiny_decoder", "diffusion_pytorch_model", "taesd_decoder")
    files = [place] if place.is_file() else [place / f"{name}.safetensors" for name in names]
    file = next((each for each in files if each.is_file()), None)
    if file is None:
        raise WeightsError(place, "holds no tiny decoder.", "Give TAESD's .safetensors file.")
    contents = read_weights(file)
    ours = plain_keys(list(contents.entries))
    entries = {ours[name]: entry for name, entry in contents.entries.items() if name in ours}
    try:
        spec = spec_of({name: tuple(entry.shape) for name, entry in entries.items()})
    except ValueError as error:
        raise WeightsError(file, f"holds no tiny decoder: {error}.") from None
    if (card := file.with_suffix(".json")).is_file():
        spec = _spec(card, TinyDecoderSpec)
    decoder = TinyDecoder(spec)
    load_into(decoder, contents.replace(entries), dtype=torch.float32)
    return decoder.eval()


def load_unet(folder: Path) -> tuple[UNet, ScheduleSpec]:
    """UNet and schedule of a run's folder, or of a shipped member's."""
    card = folder / "model.json"
    if card.is_file():
        spec = ModelSpec.model_validate(json.loads(card.read_text())["spec"])
        unet, schedule = spec.unet, spec.schedule
    else:
        unet = _spec(folder / "unet.json", UNetSpec)
        schedule = _spec(folder / "schedule.json", ScheduleSpec)
    return _filled(UNet(unet), folder / "unet.safetensors"), schedule


def clip_normalised(pixels: Tensor) -> Tensor:
    """Pictures ``(N, 3, H, W)`` in [-1, 1] to what a CLIP vision tower reads."""
    mean = pixels.new_tensor(CLIP_MEAN)[:, None, None]
    std = pixels.new_tensor(CLIP_STD)[:, None, None]
    return (pixels / 2 + 0.5 - mean) / std


def _spec(file: Path, kind: type[Spec]) -> Spec:
    try:
        return kind.model_validate_json(file.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(file, f"is no {kind.__name__}: {error}") from error


def _filled(module: Module, file: Path) -> Module:
    load_into(module, read_weights(file), dtype=torch.float32)
    return module.eval()
