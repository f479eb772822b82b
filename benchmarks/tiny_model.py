"""The tiny model that benchmarks run, and the folder of it that the peer reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safelight.model import Model

PROMPT = "a red cube on top of a blue sphere"


def tiny(notes: list[str]) -> Model:
    """The shipped model; random weights of its size where none are shipped yet, and says so."""
    import torch

    from safelight import presets, shipped
    from safelight.data import stilllife
    from safelight.model import Model
    from safelight.nets.clip import TextTower
    from safelight.nets.unet import UNet
    from safelight.nets.vae import VAE
    from safelight.text.tokenizer import Tokenizer, learn_vocabulary

    if shipped.names():
        return Model.load("tiny", device="cpu")
    notes.append("Random weights of the tiny size: the shipped ones were not there.")
    torch.manual_seed(0)
    vocab, merges = learn_vocabulary(stilllife.all_captions_corpus(200, 0), 100)
    spec = presets.TINY
    assert spec.text is not None
    ends = {"bos_id": vocab["<|startoftext|>"], "eos_id": vocab["<|endoftext|>"]}
    text = spec.text.replace(vocab_size=len(vocab), pad_id=ends["eos_id"], **ends)
    spec = spec.replace(text=text, vision=None)
    return Model(
        spec=spec,
        unet=UNet(spec.unet),
        vae=VAE(spec.vae),
        text=TextTower(text),
        tokenizer=Tokenizer.from_vocab(vocab, merges, context_length=text.context_length),
    )


def export(model: Model, folder: Path) -> None:
    """The published layout, as ``safelight models export`` writes it."""
    from safelight.store.folder import write_folder

    states = {part: net.state_dict() for part, net in model.networks.items() if part != "vision"}
    write_folder(folder, model.spec.replace(vision=None), states, model.tokenizer)


def peer(folder: Path, *, channels_last: bool = False) -> Any:
    """diffusers' pipeline on the exported folder, with the folder's own scheduler."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    for log in (logging, transformers_logging):
        log.set_verbosity_error()
        log.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    if channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    return pipe
