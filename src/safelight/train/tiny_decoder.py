"""Training a tiny decoder: the big decoder's pictures, from the same latents, in pixels.

Absolute and squared error, weighted towards edges, and the differences of neighbouring pixels, as
for the autoencoder; the big decoder is what it is compared with, because that is what it replaces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from safelight.errors import InvalidRequest
from safelight.nets.tiny_decoder import TinyDecoder
from safelight.parts import load_tiny_decoder, load_vae
from safelight.train.autoencoder import edge_weight
from safelight.train.pictures import SPLITS, Stream, key, save_grid, validation
from safelight.train.recipe import Recipe

FILE = "tiny_decoder"


class TinyDecoderObjective:
    """See the file's head; ``recipe.decoder`` holds the weights of the terms."""

    def __init__(self, recipe: Recipe) -> None:
        if recipe.decoder is None:
            raise InvalidRequest("decoder", "the recipe has no such section.")
        self.recipe, self.settings = recipe, recipe.decoder
        self.vae = load_vae(self.settings.vae).requires_grad_(False)
        self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        spec, vae = self.settings.decoder, self.vae.spec
        if (spec.latent_channels, spec.factor) != (vae.latent_channels, vae.factor):
            raise InvalidRequest("decoder.blocks", f"needs {vae.factor}x from {vae.channels}.")
        torch.manual_seed(recipe.seed)
        self.module: nn.Module = TinyDecoder(spec)
        if recipe.start is not None:
            self.module.load_state_dict(load_tiny_decoder(recipe.start).state_dict())
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.stream = Stream(recipe.data, recipe.seed)

    def data_digest(self) -> str:
        return self.stream.digest()

    def data_report(self) -> Mapping[str, Any]:
        return self.stream.report()

    @torch.no_grad()
    def batch(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Latents, a sample of the posterior each, and the big decoder's pictures of them."""
        places, flips = self.stream.places(start, count)
        pixels = self.stream.pixels(places, flips).to(memory_format=torch.channels_last)
        seen = self.vae.encode(pixels)
        noise = [
            key(self.recipe.seed, start + i, 3).standard_normal(seen.mean.shape[1:], "float32")
            for i in range(count)
        ]
        return self._pair(seen.sample(torch.stack([torch.from_numpy(n) for n in noise])))

    def _pair(self, z: Tensor) -> tuple[Tensor, Tensor]:
        latents = z * self.vae.spec.scaling_factor
        return latents, self.vae.decode(latents).clamp(-1, 1)

    def loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        latents, wanted = batch
        s = self.settings
        error = module(latents) - wanted
        weight = edge_weight(wanted, s.edges)
        l1, mse = (error.abs() * weight).mean(), (error.square() * weight).mean()
        gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        psnr = 10 * math.log10(4 / float(error.detach().square().mean()))
        return s.l1 * l1 + s.mse * mse + s.gradient * gradient, {"psnr": psnr}

    @torch.no_grad()
    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """PSNR to the big decoder's pictures in dB, mean over held-out ones."""
        numbers = {}
        for split in SPLITS[:2]:
            pixels, _ = validation(self.recipe.data, split, 128)
            found = []
            for part in pixels.split(32):
                latents, wanted = self._pair(self.vae.encode(part).mean)
                error = module(latents).clamp(-1, 1) - wanted
                found.append(10 * torch.log10(4 / error.square().flatten(1).mean(1)))
            numbers[f"psnr_{split}"] = round(float(torch.cat(found).mean()), 3)
        return numbers

    @torch.no_grad()
    def sample(self, module: nn.Module, path: Path) -> None:
        """The big decoder's pictures above the tiny one's."""
        pixels, _ = validation(self.recipe.data, "combo", 12)
        latents, wanted = self._pair(self.vae.encode(pixels).mean)
        save_grid([wanted, module(latents)], path)

    def export(self, module: nn.Module, folder: Path) -> None:
        """Writes ``tiny_decoder.safetensors`` (TAESD's layout) and ``tiny_decoder.json``."""
        state = {f"decoder.{k}": v.contiguous() for k, v in module.state_dict().items()}
        save_file(state, folder / f"{FILE}.safetensors")
        (folder / f"{FILE}.json").write_text(self.settings.decoder.model_dump_json(indent=1))
