"""Training the KL autoencoder (Rombach et al. 2022, section 3.1, without the adversary).

Reconstruction (L1, squared error, and L1 of neighbouring-pixel differences, which keeps edges
sharp), weighted towards edges; and a very small pull of the posterior to the unit Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from safelight.errors import InvalidRequest
from safelight.nets.vae import VAE
from safelight.parts import load_vae
from safelight.train.pictures import SPLITS, Stream, key, save_grid, validation
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
            self.module.load_state_dict(load_vae(recipe.start).state_dict())
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.settings.freeze_encoder:
            self.module.encoder.requires_grad_(False)
            self.module.quant_conv.requires_grad_(False)
        self.stream = Stream(recipe.data, recipe.seed)

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
        return self.stream.pixels(places, flips), noise

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
        numbers = {}
        for split in SPLITS[:2]:
            pixels, scenes = validation(self.recipe.data, split, 256)
            made = torch.cat([_reconstruct(module, p) for p in pixels.split(64)])
            mse = (made.clamp(-1, 1) - pixels).square().flatten(1).mean(1)
            psnr = 10 * torch.log10(4 / mse)
            two = torch.tensor([s.b is not None for s in scenes])
            numbers[f"psnr_{split}"] = round(float(psnr.mean()), 3)
            numbers[f"psnr_{split}_two"] = round(float(psnr[two].mean()), 3)
        pixels, _ = validation(self.recipe.data, "val", 256)
        numbers["latent_std"] = round(float(module.encode(pixels).mean.std()), 4)  # type: ignore[operator]
        return numbers

    def sample(self, module: nn.Module, path: Path) -> None:
        pixels, _ = validation(self.recipe.data, "combo", 24)
        made = _reconstruct(module, pixels)
        rows = [part for i in (0, 12) for part in (pixels[i : i + 12], made[i : i + 12])]
        save_grid(rows, path)

    def export(self, module: nn.Module, folder: Path) -> None:
        """Writes ``vae.safetensors`` and ``vae.json``; measures the scaling factor on the way."""
        spec = self.settings.vae
        with torch.no_grad():
            pixels, _ = validation(self.recipe.data, "val", 512)
            std = torch.cat([module.encode(p).mean for p in pixels.split(64)]).std()  # type: ignore[operator]
        if not self.settings.freeze_encoder:
            spec = spec.replace(scaling_factor=round(1 / float(std), 4))
        state = {k: v.contiguous() for k, v in module.state_dict().items()}
        save_file(state, folder / "vae.safetensors")
        (folder / "vae.json").write_text(spec.model_dump_json(indent=1))


def _reconstruct(module: nn.Module, pixels: Tensor) -> Tensor:
    posterior = module.encode(pixels)  # type: ignore[operator]
    return module.decoder(module.post_quant_conv(posterior.mean))  # type: ignore[operator]
