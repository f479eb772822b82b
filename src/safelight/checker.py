"""A loaded safety checker: its network, how a picture goes into it, what its concepts are called.

It gives scores. What they mean is :mod:`safelight.safety`'s to say.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight import shipped
from safelight.errors import ModelNotFound
from safelight.nets.safety_head import Cosines, SafetyHead, SafetyScores, adjusted_scores
from safelight.spec import PictureSpec, SafetySpec
from safelight.store.checkers import CheckerContents, find_checker, read_checker
from safelight.store.weights import load_into

log = logging.getLogger(__name__)

NO_CHECKER = "no safety checker: pictures are not checked (--safety-checker attaches one)"
"""The note of a model that has none."""


@dataclass(eq=False)
class Checker:
    """A safety checker on a device."""

    spec: SafetySpec
    head: SafetyHead
    source: str = "memory"
    digest: str = ""
    """SHA-256 of its concepts and thresholds, which make two checkers different."""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.head.requires_grad_(False).eval()
        if not self.digest:
            self.digest = _digest(self.head)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        local_only: bool | None = None,
    ) -> Checker:
        """Load a checker: a shipped one's name, a folder, that of a model that has one, or a hub
        id of either.

        Raises:
            ModelNotFound, WeightsError: with what to do about it.
        """
        found = shipped.read_checker(name)
        if found is not None:
            spec, head, digest = found
            return cls(spec, head, f"shipped:{name}", digest).to(device, dtype)
        path = Path(name).expanduser()
        if path.exists():
            if find_checker(path) is None:
                raise ModelNotFound(f"{path}: holds no safety checker (config.json and weights).")
        else:
            from safelight.store.hub import fetch_checker

            path = fetch_checker(str(name), local_only=local_only)
        return cls.from_contents(read_checker(path), device, dtype)

    @classmethod
    def from_contents(
        cls, contents: CheckerContents, device: torch.device | str, dtype: torch.dtype
    ) -> Checker:
        """Read the weights."""
        spec = contents.spec
        with torch.device("meta"):
            head = SafetyHead(spec.vision, concepts=spec.concepts, special=spec.special)
        load_into(head, contents.tensors, dtype=None)
        return cls(spec, head, str(contents.path), notes=contents.notes).to(device, dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Checker:
        """Moved in place, in the model's dtype, as published: in float16 its cosines are rounded
        to it. Bfloat16 has too few digits for three decimals: float32 then."""
        self.head.to(device, torch.float32 if dtype == torch.bfloat16 else dtype)
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Of all concepts, special ones last; numbers where they are hidden."""
        plain = [f"concept {k}" for k in range(self.spec.concepts)]
        special = [f"special concept {k}" for k in range(self.spec.special)]
        return self.spec.names or (*plain, *special)

    @property
    def thresholds(self) -> Cosines:
        """``(concepts,)`` and ``(special,)``, in float32."""
        head = self.head
        return Cosines(
            head.concept_embeds_weights.float(), head.special_care_embeds_weights.float()
        )

    @torch.inference_mode()
    def cosines(self, images: Sequence[Image.Image]) -> Cosines:
        """Similarities ``(N, concepts)`` and ``(N, special)`` of pictures, on the CPU."""
        weight = self.head.visual_projection.weight
        pixels = torch.stack([clip_pixels(image, self.spec.pictures) for image in images])
        found = self.head.cosines(pixels.to(weight.device, weight.dtype))
        return Cosines(found.concepts.cpu(), found.special.cpu())

    @torch.inference_mode()
    def scores(self, images: Sequence[Image.Image]) -> SafetyScores:
        """Scores of pictures, by the published rule."""
        plain, special = self.thresholds
        return adjusted_scores(self.cosines(images), Cosines(plain.cpu(), special.cpu()))


def clip_pixels(image: Image.Image, spec: PictureSpec) -> Tensor:
    """A picture as CLIP's published processor hands it to a vision tower.

    The shorter side is resized (Pillow's antialiased filter), a square is cut from the middle,
    and the channels are normalised: ``(3, crop, crop)`` in float32.
    """
    image = image.convert("RGB")
    if spec.resize:
        width, height = image.size
        short = min(width, height)
        size = [
            spec.resize if side == short else int(spec.resize * side / short)
            for side in (width, height)
        ]
        image = image.resize((size[0], size[1]), Image.Resampling(spec.resample))
    if spec.crop:
        left, top = (image.width - spec.crop) // 2, (image.height - spec.crop) // 2
        image = image.crop((left, top, left + spec.crop, top + spec.crop))  # black where smaller
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    mean, std = (np.array(values, dtype=np.float32) for values in (spec.mean, spec.std))
    pixels = (pixels - mean) / std
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _digest(head: SafetyHead) -> str:
    """Of what is small and tells checkers apart: the tower has hundreds of megabytes."""
    found = hashlib.sha256()
    for name, tensor in head.named_parameters():
        if not name.startswith("vision_model."):
            found.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()
