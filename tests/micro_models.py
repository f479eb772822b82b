"""A random text-to-image model, small enough that a picture takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

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
    vae=VAESpec(channels=(8, 8, 16, 16), layers_per_block=1, sample_size=32, norm_groups=4),
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
    words=tuple(sorted(stilllife.vocabulary())),
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


class ToyUNet(nn.Module):
    """Answers at once: mostly the noise it is shown, a little of the prompt and the time."""

    def __init__(self, spec: ModelSpec = MICRO) -> None:
        super().__init__()
        channels = spec.vae.latent_channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.words = nn.Linear(spec.unet.context_width, channels)
        self.calls: list[int] = []
        self.poison: Callable[[Tensor], Tensor] = lambda answer: answer
        self.before: Callable[[], object] = lambda: None

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, *_: Tensor | None) -> Tensor:
        self.before()
        self.calls.append(len(x))
        said = self.words(tokens).mean(dim=1)[:, :, None, None]
        time = (t / 1000).to(x)[:, None, None, None]
        return self.poison(0.9 * x + 0.2 * self.conv(x) + said + 0.1 * time)


class ToyVAE(nn.Module):
    """Latents to pixels in one layer."""

    def __init__(self, spec: ModelSpec = MICRO) -> None:
        super().__init__()
        factor = spec.vae.factor
        self.up = nn.ConvTranspose2d(spec.vae.latent_channels, 3, factor, stride=factor)
        self.poison: Callable[[Tensor], Tensor] = lambda pixels: pixels

    def decode(self, latents: Tensor) -> Tensor:
        return self.poison(torch.tanh(self.up(latents)))


def toy_model(spec: ModelSpec = MICRO, **changes: Any) -> Model:
    """A model whose UNet and decoder are toys of this test's own; its text tower is real."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        toys = {"unet": ToyUNet(spec), "vae": ToyVAE(spec)}
    return micro_model(spec, **{**toys, **changes})
