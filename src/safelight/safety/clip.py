"""Sentences and pictures to directions in one space: any CLIP that has projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from safelight.checker import clip_pixels
from safelight.errors import WeightsError
from safelight.nets.clip import TextTower, VisionTower
from safelight.parts import load_text, load_vision
from safelight.safety.concepts import opened
from safelight.spec import PictureSpec, TextSpec, VisionSpec
from safelight.store.components import read_component
from safelight.store.weights import load_into
from safelight.text.tokenizer import Tokenizer

_CHUNK = 32


@dataclass(frozen=True)
class Clip:
    """The two towers; the text tower is needed for sentences only."""

    vision: VisionTower
    text: TextTower | None = None
    tokenizer: Tokenizer | None = None

    @property
    def pictures(self) -> PictureSpec:
        """How a picture goes in."""
        size = self.vision.spec.image_size
        return PictureSpec(resize=size, crop=size)

    @torch.inference_mode()
    def of_sentences(self, sentences: Sequence[str]) -> Tensor:
        """Unit embeddings ``(N, projection_width)``."""
        if self.text is None or self.tokenizer is None or self.text.text_projection is None:
            raise WeightsError(
                "clip", "has no text tower with a projection.", "Give pictures instead."
            )
        ids = torch.tensor(self.tokenizer.tokens(sentences))
        found = self.text(ids).embedding
        assert found is not None
        return F.normalize(found.float())

    @torch.inference_mode()
    def of_pictures(self, paths: Sequence[Path]) -> Tensor:
        """Unit embeddings ``(N, projection_width)``."""
        found = []
        for start in range(0, len(paths), _CHUNK):
            images = opened(paths[start : start + _CHUNK], "pictures")
            pixels = torch.stack([clip_pixels(image, self.pictures) for image in images])
            found.append(F.normalize(self.vision(pixels).embedding.float()))
        return torch.cat(found)


def load_clip(folder: Path) -> Clip:
    """A CLIP's folder: a published ``CLIPModel`` or vision tower, or a training run's.

    Raises:
        WeightsError: neither, or damaged.
    """
    if (folder / "vision.json").is_file():
        text = load_text(folder) if (folder / "text.json").is_file() else (None, None)
        return Clip(load_vision(folder), *text)
    if not (folder / "config.json").is_file():
        raise WeightsError(folder, "holds no CLIP (neither config.json nor vision.json).")
    spec, tensors, _ = read_component(folder, "vision")
    assert isinstance(spec, VisionSpec)
    assert tensors is not None
    vision = VisionTower(spec)
    load_into(vision, tensors, dtype=torch.float32)
    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        return Clip(vision.eval())
    tokenizer = Tokenizer.from_folder(folder)
    spec, tensors, _ = read_component(folder, "text")
    assert isinstance(spec, TextSpec)
    assert tensors is not None
    text = TextTower(spec.replace(eos_id=tokenizer.eos_id))
    load_into(text, tensors, dtype=torch.float32)
    return Clip(vision.eval(), text.eval(), tokenizer)
