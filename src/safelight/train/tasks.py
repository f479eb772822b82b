"""What a UNet is told while it trains: one small class a task, over the same loss.

A task fills the slots of the network (tokens, class vector, planes beside the latents) for the
pictures of a batch, and knows their unconditional twin. Everything random comes from generators
that belong to the picture, so a batch is a function of its place in the run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.diffusion.prediction import noised
from safelight.diffusion.schedule import Schedule
from safelight.errors import InvalidRequest
from safelight.nets.layers import sinusoid
from safelight.presets import NOISE_AUGMENTATION, X4_NOISING
from safelight.train.frozen import Frozen
from safelight.train.masks import lama_mask
from safelight.train.pictures import Pictures
from safelight.train.recipe import DiffusionRecipe


class Told(NamedTuple):
    """The network's inputs beside latents and timestep, for a batch."""

    tokens: Tensor
    """``(N, S, context_width)``."""
    vector: Tensor | None = None
    planes: Tensor | None = None
    guidance: Tensor | None = None

    def each(self, *, rows: slice) -> Told:
        """The same for some of the pictures."""
        return Told(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Told:
        return Told(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]


class Batch(NamedTuple):
    """Some pictures of a run, ready for the loss."""

    latents: Tensor
    noise: Tensor
    """``(N, C, h, w)``, with its offset where the recipe has one: what is to be found."""
    t: Tensor
    told: Told
    seen_noise: Tensor
    """The noise that the network is shown: ``noise``, perturbed where the recipe says so."""
    scale: Tensor
    """``(N,)``: a guidance scale for each, for students that are told one."""


@dataclass
class Draw:
    """Some pictures of a run, and their own random numbers."""

    pictures: Pictures
    places: np.ndarray
    flips: np.ndarray
    rngs: list[np.random.Generator]
    """One a picture: noise, dropping, caption, in this order."""
    extra: list[np.random.Generator]
    """One a picture, for everything else."""
    dropped: np.ndarray
    """Which pictures are to be seen without their conditioning, ``(N,)`` bool."""
    crop: int = 0
    plain: bool = False
    """The plain captions, for a sheet of samples."""
    shown: bool = False
    """For samples and validation: no share is hidden, levels are the card's."""
    corners: list[tuple[int, int]] = field(default_factory=list)

    @cached_property
    def pixels(self) -> Tensor:
        """``(N, 3, H, W)`` in [-1, 1], cropped where the recipe says so."""
        whole = self.pictures.pixels(self.places, self.flips)
        if not self.crop or self.crop == whole.shape[-1]:
            return whole
        slack = whole.shape[-1] - self.crop
        if not self.corners:
            self.corners = [
                (slack // 2, slack // 2) if self.shown else tuple(r.integers(0, slack + 1, 2))  # type: ignore[misc]
                for r in self.extra
            ]
        rows = zip(whole, self.corners, strict=True)
        return torch.stack([p[:, y : y + self.crop, x : x + self.crop] for p, (y, x) in rows])

    def captions(self) -> list[str]:
        """One a picture; dropped ones are empty."""
        kept = [i for i, gone in enumerate(self.dropped) if not gone]
        said = self.pictures.captions(
            self.places[kept], self.flips[kept], [self.rngs[i] for i in kept], plain=self.plain
        )
        words = dict(zip(kept, said, strict=True))
        return [words.get(i, "") for i in range(len(self.places))]

    def normal(self, *shape: int) -> Tensor:
        """Unit normal numbers ``(N, *shape)`` of each picture's own."""
        rows = [r.standard_normal(shape, dtype=np.float32) for r in self.extra]
        return torch.from_numpy(np.stack(rows))

    def hidden(self, share: float) -> Tensor:
        """``(N,)`` bool: which pictures a share falls on. None of the shown ones."""
        rolls = [r.random() < share for r in self.extra]
        return torch.tensor([roll and not self.shown for roll in rolls])


class Task(Protocol):
    """See the file's head."""

    def told(self, draw: Draw) -> Told:
        """What the network is told of these pictures."""
        ...

    def twin(self, told: Told) -> Told:
        """The unconditional branch of the same pictures."""
        ...


class Text:
    """A caption's states (Rombach et al. 2022, section 3.3); the twin reads the empty caption."""

    looks = False
    channels = 0

    def __init__(self, settings: DiffusionRecipe, frozen: Frozen) -> None:
        self.settings, self.frozen = settings, frozen
        have, needed = settings.unet.in_channels, self._latent_channels() + self.channels
        if have != needed:
            raise InvalidRequest(
                "diffusion.unet.in_channels", f"{have}, but {settings.task} needs {needed}."
            )

    def _latent_channels(self) -> int:
        return self.settings.unet.out_channels

    def told(self, draw: Draw) -> Told:
        return Told(self.frozen.words(draw.captions()))

    def twin(self, told: Told) -> Told:
        empty = self.frozen.words([""]).to(told.tokens)
        return told._replace(tokens=empty.expand_as(told.tokens))


class Variations(Text):
    """The picture's own CLIP embedding, projected and not normalised, as the one token (Pinkney
    2022); zeros when dropped."""

    looks = True

    def told(self, draw: Draw) -> Told:
        seen = self.frozen.look(draw.pixels, antialias=self.settings.antialias)
        seen[torch.from_numpy(draw.dropped)] = 0.0
        return Told(seen[:, None])

    def twin(self, told: Told) -> Told:
        return told._replace(tokens=torch.zeros_like(told.tokens))


class UnCLIP(Text):
    """A caption, and the picture's noised embedding with its level as the class vector (Ramesh et
    al. 2022, section 2.1). Levels are uniform; some vectors are zeroed, and so is the twin's."""

    looks = True

    def __init__(self, settings: DiffusionRecipe, frozen: Frozen) -> None:
        super().__init__(settings, frozen)
        self.schedule = Schedule.from_spec(NOISE_AUGMENTATION)
        assert frozen.vision is not None
        width = frozen.vision.spec.projection_width
        if settings.unet.class_embedding_size != 2 * width:
            raise InvalidRequest(
                "diffusion.unet.class_embedding_size",
                f"{settings.unet.class_embedding_size}, but the vision tower's embedding and its "
                f"level are {2 * width} numbers.",
            )
        self.mean, self.std = torch.zeros(1, width), torch.ones(1, width)

    def told(self, draw: Draw) -> Told:
        tokens = self.frozen.words(draw.captions())
        seen = self.frozen.look(draw.pixels, antialias=self.settings.antialias)
        rolls = [int(r.integers(self.schedule.steps)) for r in draw.extra]
        levels = torch.tensor([0] * len(rolls) if draw.shown else rolls, device=seen.device)
        vector = class_vector(
            seen, levels, draw.normal(seen.shape[1]), self.schedule, self.mean, self.std
        )
        vector[draw.hidden(self.settings.drop_vector)] = 0.0
        return Told(tokens, vector=vector)

    def twin(self, told: Told) -> Told:
        assert told.vector is not None
        return super().twin(told)._replace(vector=torch.zeros_like(told.vector))


def class_vector(
    embeddings: Tensor,
    levels: Tensor,
    noise: Tensor,
    schedule: Schedule,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """unCLIP's class vectors: the noised embeddings, then the sinusoids of their levels.

    Args:
        embeddings: ``(N, D)``, not normalised; ``noise`` likewise, unit normal.
        levels: ``(N,)``, 0..999.
        mean, std: ``(1, D)``, of the training set's embeddings.

    Returns:
        ``(N, 2 D)``.
    """
    mean, std, noise = mean.to(embeddings), std.to(embeddings), noise.to(embeddings)
    z = noised((embeddings - mean) / std, noise, schedule.alpha_bar(levels))
    return torch.cat([z * std + mean, sinusoid(levels, embeddings.shape[1])], dim=1)


class Inpaint(Text):
    """A caption; behind the latents a mask and the latents of the picture without what it hides
    (grey there). Masks are LaMa's; a share hides everything. The twin keeps the planes."""

    channels = 5

    def told(self, draw: Draw) -> Told:
        pixels = draw.pixels
        shape = pixels.shape[-2:]
        masks = torch.from_numpy(np.stack([lama_mask(r, *shape) for r in draw.extra]))[:, None]
        masks[draw.hidden(self.settings.drop_picture)] = 1.0
        kept = self.frozen.encode(pixels * (masks < 0.5))
        small = F.interpolate(masks, kept.shape[-2:]).to(kept)
        return Told(self.frozen.words(draw.captions()), planes=torch.cat([small, kept], dim=1))


class Depth(Text):
    """A caption; behind the latents a map of nearness from -1 to 1. The twin keeps it."""

    channels = 1

    def told(self, draw: Draw) -> Told:
        if draw.crop:
            raise InvalidRequest("data.crop", "depth maps are of whole pictures.", "Leave it out.")
        side = self.settings.unet.sample_size
        near = draw.pictures.nearness(draw.places, draw.flips, side)[:, None]
        low, high = near.amin((2, 3), keepdim=True), near.amax((2, 3), keepdim=True)
        planes = 2 * (near - low) / (high - low).clamp(min=1e-6) - 1
        return Told(self.frozen.words(draw.captions()), planes=planes)


class Upscale(Text):
    """A caption; behind the latents the picture at a quarter of its size with noise of a level,
    which is told too (Rombach et al. 2022, section 4.4). Levels are uniform. The twin keeps both.
    """

    channels = 3

    def __init__(self, settings: DiffusionRecipe, frozen: Frozen) -> None:
        super().__init__(settings, frozen)
        self.schedule = Schedule.from_spec(X4_NOISING)

    def told(self, draw: Draw) -> Told:
        pixels = draw.pixels
        small = F.interpolate(pixels, scale_factor=0.25, mode="bicubic", antialias=True)
        small = small.clamp(-1, 1)
        rolls = [int(r.integers(self.settings.levels)) for r in draw.extra]
        shown = min(20, self.settings.levels - 1)
        levels = torch.tensor([shown] * len(rolls) if draw.shown else rolls)
        noise = draw.normal(*small.shape[1:])
        planes = noised(small, noise, self.schedule.alpha_bar(levels)).float()
        return Told(self.frozen.words(draw.captions()), vector=levels, planes=planes)


TASKS: dict[str, type[Text]] = {
    "text": Text,
    "variations": Variations,
    "unclip": UnCLIP,
    "inpaint": Inpaint,
    "depth": Depth,
    "x4": Upscale,
}


def predict(module: nn.Module, x: Tensor, t: Tensor, told: Told) -> Tensor:
    """The network's answer for latents ``(N, C, h, w)`` and what it is told beside them."""
    if told.planes is not None:
        x = torch.cat([x, told.planes.to(x)], dim=1)
    slots: dict[str, Tensor] = {}
    if told.vector is not None:
        slots["vector"] = told.vector
    if told.guidance is not None:
        slots["guidance"] = told.guidance
    return module(x.to(memory_format=torch.channels_last), t, told.tokens, **slots)
