"""A random text-to-image model, small enough that a picture takes milliseconds."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from safelight.data import stilllife
from safelight.model import Model
from safelight.nets.clip import TextTower
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.spec import ModelSpec, TextSpec, UNetSpec, VAESpec
from safelight.text.tokenizer import Tokenizer, learn_vocabulary

VOCAB, MERGES = learn_vocabulary(stilllife.all_captions_corpus(200, 0), 100)

MICRO = ModelSpec(
    name="micro",
    unet=UNetSpec(
        sample_size=4,
        channels=(16, 32),
        attention=(True, True),
        heads=(2, 2),
        only_cross_attention=(False, False),
        layers_per_block=1,
        context_width=16,
        norm_groups=8,
    ),
    vae=VAESpec(
        channels=(8, 8, 16, 16), layers_per_block=1, sample_size=32, norm_groups=4
    ),
    text=TextSpec(
        vocab_size=len(VOCAB),
        width=16,
        layers=2,
        heads=2,
        mlp_width=32,
        context_length=16,
        bos_id=VOCAB["<|startoftext|>"],
        eos_id=VOCAB["<|endoftext|>"],
        pad_id=VOCAB["<|endoftext|>"],
    ),
    steps=5,
    world="stilllife",
)


@cache
def networks(unet: UNetSpec, vae: VAESpec, text: TextSpec) -> dict[str, Any]:
    """Random networks; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"unet": UNet(unet), "vae": VAE(vae), "text": TextTower(text)}


def micro_model(spec: ModelSpec = MICRO, **changes: Any) -> Model:
    """A model in memory; models of one size share their networks."""
    assert spec.text is not None
    tokenizer = Tokenizer.from_vocab(VOCAB, MERGES, context_length=spec.text.context_length)
    nets = networks(spec.unet, spec.vae, spec.text)
    return Model(spec=spec, tokenizer=tokenizer, **{**nets, **changes})
