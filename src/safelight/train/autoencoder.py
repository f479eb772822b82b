"""Training the KL autoencoder (Rombach et al. 2022, section 3.1, without the adversary).

Reconstruction (L1, squared error, and L1 of neighbouring-pixel differences, which keeps edges
sharp), weighted towards edges; and a very small pull of the posterior to the unit Gaussian. The
published autoencoders have a perceptual term (LPIPS) too, whose network is not part of this
project. On still life, or on any pictures: captions are not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from safelight.errors import InvalidRequest
from safelight.nets.vae import VAE
from safelight.train.frozen import load_autoencoder
from safelight.train.pictures import SPLITS, key, open_pictures, save_grid, validation
from safelight.train.processes import own_device
from safelight.train.recipe import Recipe


def edge_weight(pixels: Tensor, strength: float) -> Tensor:
    """``1 + strength`` times how near an edge a pixel is, ``(N, 1, H, W)``."""
    right = F.pad((pixels[..., :, 1:] - pixels[..., :, :-1]).abs().amax(1, keepdim=True), (0, 1))
    below = F.pad(
        (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().amax(1, keepdim=True), (0, 0, 0, 1)
    )
    near = F.max_pool2d(right + below, 3, stride=1, padding=1)
    return 1 + strength * near.clamp(max=0.5) * 2


class AutoencoderObjective:
    """See the file's head; ``recipe.vae`` holds the weights of the terms."""

    def __init__(self, recipe: Recipe) -> None:
        if recipe.vae is None:
            raise InvalidRequest("vae", "the recipe has no such section.")
        self.recipe, self.settings = recipe, recipe.vae
        torch.manual_seed(recipe.seed)
        self.module: VAE = VAE(recipe.vae.vae)
        if recipe.start is not None:
            self.module.load_state_dict(load_autoencoder(recipe.start).state_dict())
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.settings.freeze_encoder:
            self.module.encoder.requires_grad_(False)
            self.module.quant_conv.requires_grad_(False)
        self.still_life = recipe.data.source == "stilllife"
        data = recipe.data if self.still_life else recipe.data.replace(captions="optional")
        self.stream, self.device = open_pictures(data, recipe.seed), own_device()

    def data_digest(self) -> str:
        return self.stream.digest()

    def data_report(self) -> Mapping[str, Any]:
        return self.stream.report()

    def batch(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        places, flips = self.stream.places(start, count)
        factor, channels = self.settings.vae.factor, self.settings.vae.latent_channels
        side = self.recipe.data.size // factor
        noise = torch.stack(
            [
                torch.from_numpy(
                    key(self.recipe.seed, start + i, 3).standard_normal(
                        (channels, side, side), dtype="float32"
                    )
                )
                for i in range(count)
            ]
        )
        return self.stream.pixels(places, flips).to(self.device), noise.to(self.device)

    def loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        pixels, noise = batch
        s = self.settings
        made, posterior = module(pixels, noise)
        weight = edge_weight(pixels, s.edges)
        error = made - pixels
        l1 = (error.abs() * weight).mean()
        mse = (error.square() * weight).mean()
        gradient = (error[..., 1:] - error[..., :-1]).abs().mean() + (
            error[..., 1:, :] - error[..., :-1, :]
        ).abs().mean()
        kl = posterior.kl().mean()
        total = s.l1 * l1 + s.mse * mse + s.gradient * gradient + s.kl * kl
        psnr = 10 * math.log10(4 / float(error.detach().square().mean()))
        return total, {"psnr": psnr, "kl": float(kl.detach())}

    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """PSNR in dB on held-out pictures, mean over pictures; two-object scenes named apart."""
        if not self.still_life:
            return self._validate_own(module)
        numbers = {}
        for split in SPLITS[:2]:
            pixels, scenes = validation(self.recipe.data, split, 256)
            psnr = torch.cat([_psnr(module, p) for p in pixels.split(64)])
            two = torch.tensor([s.b is not None for s in scenes])
            numbers[f"psnr_{split}"] = round(float(psnr.mean()), 3)
            numbers[f"psnr_{split}_two"] = round(float(psnr[two].mean()), 3)
        numbers["latent_std"] = round(self._latent_std(module, 256), 4)
        return numbers

    def _validate_own(self, module: nn.Module) -> Mapping[str, float]:
        numbers = {"latent_std": round(self._latent_std(module, 64), 4)}
        if self.stream.held_out("val", 64) is not None:
            psnr = torch.cat([_psnr(module, p) for p in self._shown(64)])
            numbers["psnr_val"] = round(float(psnr.mean()), 3)
        return numbers

    def _shown(self, count: int) -> Iterator[Tensor]:
        """Held-out pictures in small batches; where the source holds none out, trained ones."""
        if self.still_life:
            pixels, _ = validation(self.recipe.data, "val", count)
            yield from pixels.split(64)
            return
        pictures = self.stream.held_out("val", count) or self.stream
        batch = max(1, min(64, 2**20 // self.recipe.data.size**2))
        for start in range(0, count, batch):
            places = np.arange(start, min(start + batch, count))
            yield pictures.pixels(places, np.zeros(len(places), bool))

    @torch.no_grad()
    def _latent_std(self, module: nn.Module, count: int) -> float:
        means = [module.encode(p.to(_place(module))).mean for p in self._shown(count)]  # type: ignore[operator]
        return float(torch.cat(means).std())

    def sample(self, module: nn.Module, path: Path) -> None:
        """Pictures, and below them what comes back."""
        if self.still_life:
            pixels, _ = validation(self.recipe.data, "combo", 24)
        else:
            pixels = torch.cat(list(self._shown(24)))
        made = torch.cat([_reconstruct(module, p) for p in pixels.split(4)]).cpu()
        rows = [part for i in (0, 12) for part in (pixels[i : i + 12], made[i : i + 12])]
        save_grid(rows, path)

    def export(self, module: nn.Module, folder: Path) -> None:
        """Writes ``vae.safetensors`` and ``vae.json``; measures the scaling factor on the way."""
        spec = self.settings.vae
        if not self.settings.freeze_encoder:
            std = self._latent_std(module, 512 if self.still_life else 64)
            spec = spec.replace(scaling_factor=round(1 / std, 4))
        state = {k: v.contiguous() for k, v in module.state_dict().items()}
        save_file(state, folder / "vae.safetensors")
        (folder / "vae.json").write_text(spec.model_dump_json(indent=1))


def _place(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _psnr(module: nn.Module, pixels: Tensor) -> Tensor:
    """Of each reconstruction ``(N,)``, in dB."""
    made = _reconstruct(module, pixels).clamp(-1, 1).cpu()
    return 10 * torch.log10(4 / (made - pixels).square().flatten(1).mean(1))


@torch.no_grad()
def _reconstruct(module: nn.Module, pixels: Tensor) -> Tensor:
    posterior = module.encode(pixels.to(_place(module)))  # type: ignore[operator]
    return module.decoder(module.post_quant_conv(posterior.mean))  # type: ignore[operator]
