"""The parts of a run that do not learn: towers and autoencoder, from wherever they are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from safelight.errors import InvalidRequest
from safelight.model import Model
from safelight.nets.clip import TextTower, VisionTower
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.parts import clip_normalised, load_text, load_unet, load_vae, load_vision
from safelight.spec import ScheduleSpec
from safelight.text.tokenizer import Tokenizer


@dataclass
class Frozen:
    """Towers, tokenizer and autoencoder. What a task has no use for may be missing."""

    vae: VAE | None = None
    text: TextTower | None = None
    tokenizer: Tokenizer | None = None
    vision: VisionTower | None = None

    def __post_init__(self) -> None:
        for net in (self.vae, self.text, self.vision):
            if net is not None:
                net.requires_grad_(False).eval()

    def to(self, device: torch.device) -> Frozen:
        """Move the networks, for good."""
        for net in (self.vae, self.text, self.vision):
            if net is not None:
                net.to(device)
        return self

    def digest(self, name: str) -> str:
        """12 characters that stand for the weights of ``vae``, ``text`` or ``vision``."""
        net: nn.Module | None = getattr(self, name)
        if net is None:
            raise InvalidRequest(name, "this run was given none.")
        digest = hashlib.blake2b()
        for key, value in net.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]

    @torch.no_grad()
    def words(self, captions: list[str]) -> Tensor:
        """Unpooled text states ``(N, L, width)``."""
        return self.reading(captions)[0]

    @torch.no_grad()
    def reading(self, captions: list[str]) -> tuple[Tensor, Tensor | None, Tensor]:
        """States, projected embeddings (where the tower has them), and which tokens are not
        padding, ``(N, L)``."""
        if self.text is None or self.tokenizer is None:
            raise InvalidRequest("clip", "this task reads captions, but the folder has no text.")
        place = next(self.text.parameters()).device
        ids = torch.tensor(self.tokenizer.tokens(captions), device=place)
        said = self.text(ids)
        end = (ids == self.text.spec.eos_id).int().argmax(dim=1, keepdim=True)
        mask = torch.arange(ids.shape[1], device=place)[None] <= end
        return said.states, said.embedding, mask

    @torch.no_grad()
    def look(self, pixels: Tensor, *, antialias: bool = True) -> Tensor:
        """Projected CLIP embeddings ``(N, D)`` of pictures in [-1, 1], squeezed to CLIP's square.

        Args:
            antialias: the original variations were trained without.
        """
        if self.vision is None:
            raise InvalidRequest("clip", "this task looks at pictures: it needs a vision tower.")
        side = self.vision.spec.image_size
        pixels = pixels.to(next(self.vision.parameters()).device)
        if pixels.shape[-2:] != (side, side):
            pixels = torch.nn.functional.interpolate(
                pixels, (side, side), mode="bicubic", antialias=antialias
            )
        return self.vision(clip_normalised(pixels)).embedding

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents ``(N, C, h, w)``: the posterior's mean, or a sample of it."""
        if self.vae is None:
            raise InvalidRequest("vae", "this run was given none.")
        seen = self.vae.encode(pixels.to(next(self.vae.parameters()).device))
        latents = seen.mean if noise is None else seen.sample(noise.to(seen.mean))
        return latents * self.vae.spec.scaling_factor


def load_frozen(
    clip: Path, vae: Path | None = None, *, text: bool = True, vision: bool = False
) -> Frozen:
    """The frozen parts of folders: a run's or the family's, or a published model's."""
    parts = Frozen()
    own = (clip / "text.json").is_file() or (clip / "vision.json").is_file()
    model = None if own else Model.load(clip, device="cpu", dtype=torch.float32)
    if text and model is None:
        parts.text, parts.tokenizer = load_text(clip)
    elif text and model is not None:
        parts.text, parts.tokenizer = model.text, model.tokenizer
    if vision:
        parts.vision = load_vision(clip) if model is None else model.vision
    if vae is not None:
        parts.vae = model.vae if model is not None and vae == clip else load_autoencoder(vae)
    return Frozen(parts.vae, parts.text, parts.tokenizer, parts.vision)


def load_autoencoder(folder: Path) -> VAE:
    """The autoencoder of a run's folder, of the family's, or of a published model."""
    if (folder / "vae.json").is_file():
        return load_vae(folder)
    vae = Model.load(folder, device="cpu", dtype=torch.float32).vae
    assert vae is not None
    return vae


def load_denoiser(folder: Path) -> tuple[UNet, ScheduleSpec]:
    """UNet and schedule of a run's folder, of a shipped member's, or of a published model."""
    if (folder / "unet.safetensors").is_file():
        return load_unet(folder)
    model = Model.load(folder, device="cpu", dtype=torch.float32)
    assert isinstance(model.unet, UNet)
    return model.unet, model.spec.schedule
