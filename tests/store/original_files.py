"""Published single files as names and shapes: nothing is behind them."""

from __future__ import annotations

import functools

import torch

from safelight.nets.clip import TextTower, VisionTower
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.spec import ModelSpec
from safelight.store import keymaps
from safelight.store.weights import StateDict


def meta_states(spec: ModelSpec) -> dict[str, StateDict]:
    return _meta_states(spec.model_dump_json())


@functools.cache
def _meta_states(dump: str) -> dict[str, StateDict]:
    spec = ModelSpec.model_validate_json(dump)
    with torch.device("meta"):
        nets = {"unet": UNet(spec.unet), "vae": VAE(spec.vae)}
        if spec.text:
            nets["text"] = TextTower(spec.text)
        if spec.vision:
            nets["vision"] = VisionTower(spec.vision)
    return {part: StateDict.of(net.state_dict()) for part, net in nets.items()}


def original_file(spec: ModelSpec, tmp_path, extra=None) -> StateDict:
    """Names and shapes of a full-size file; nothing behind them."""
    states = meta_states(spec)
    entries = keymaps.to_original(states, keymaps.file_rows(spec), tmp_path)
    return StateDict(entries, tmp_path / "file.ckpt", extra)
