"""CLIP embeddings of pictures and words, by any CLIP at hand; the shipped tiny one by default."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from safelight.data.framing import crop
from safelight.errors import InvalidRequest, WeightsError
from safelight.model import pick_device
from safelight.nets.clip import TextTower, VisionTower
from safelight.parts import clip_normalised, load_text, load_vision
from safelight.shipped import FAMILY
from safelight.spec import TextSpec, VisionSpec
from safelight.store.components import read_component
from safelight.store.weights import load_into
from safelight.text.tokenizer import Tokenizer

BATCH = 64


@dataclass(eq=False)
class CLIP:
    """Two towers with one space of embeddings."""

    vision: VisionTower
    text: TextTower | None
    tokenizer: Tokenizer | None
    name: str

    def __post_init__(self) -> None:
        for tower in (self.vision, self.text):
            if tower is not None:
                tower.requires_grad_(False).eval()

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return self.vision.spec.projection_width

    @property
    def digest(self) -> str:
        """Names, shapes and first values of the vision tower's weights: tells CLIPs apart."""
        sha = hashlib.sha256()
        for name, weight in sorted(self.vision.state_dict().items()):
            first = weight.flatten()[:256].float().cpu().numpy()
            sha.update(f"{name}{tuple(weight.shape)}".encode() + first.tobytes())
        return sha.hexdigest()

    def pictures(self, pictures: Iterable[Image.Image]) -> np.ndarray:
        """Embeddings of unit length, float32 ``(N, width)``; see :meth:`embeddings`."""
        return unit(self.embeddings(pictures))

    def embeddings(self, pictures: Iterable[Image.Image]) -> np.ndarray:
        """Embeddings as the tower gives them, float32 ``(N, width)``.

        The shorter side is resized, bicubic, and the middle cut out, as CLIP's own transform does.
        """
        parts = [self._embed(batch) for batch in _batches(pictures, BATCH)]
        return np.concatenate(parts) if parts else np.empty((0, self.width), np.float32)

    @torch.inference_mode()
    def _embed(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        side, weight = self.vision.spec.image_size, self.vision.visual_projection.weight
        stack = np.stack([crop(p.convert("RGB"), (side, side))[0] for p in pictures])
        pixels = torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        return self.vision(clip_normalised(pixels).to(weight)).embedding.float().cpu().numpy()

    @torch.inference_mode()
    def words(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of unit length, float32 ``(N, width)``.

        Raises:
            InvalidRequest: this CLIP has no text tower with a projection.
        """
        if self.text is None or self.tokenizer is None or self.text.text_projection is None:
            raise InvalidRequest("text", f"{self.name} has no text tower to search with.")
        device, parts = self.text.text_projection.weight.device, []
        for start in range(0, len(texts), BATCH):
            ids = torch.tensor(self.tokenizer.tokens(texts[start : start + BATCH]), device=device)
            embedding = self.text(ids).embedding
            assert embedding is not None
            parts.append(embedding.float().cpu().numpy())
        return unit(np.concatenate(parts)) if parts else np.empty((0, self.width), np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors ``(N, D)`` at length one; those of no length stay."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _batches(items: Iterable[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    stream = iter(items)
    while batch := list(islice(stream, size)):
        yield batch


def load_clip(folder: str | Path | None = None, *, device: str | None = None) -> CLIP:
    """A CLIP from a folder.

    Args:
        folder: a training run's (``vision.json`` …), or a published ``CLIPModel``'s
            (``config.json`` with both towers, weights and tokenizer beside it). None: the shipped
            tiny one, which knows still life and nothing else.
        device: default: the best there is.

    Raises:
        WeightsError: the folder holds no CLIP.
    """
    place = pick_device(device)
    root = FAMILY / "shared" if folder is None else Path(folder)
    name = "tiny" if folder is None else str(folder)
    if (root / "vision.json").is_file():
        vision = load_vision(root)
        text, tokenizer = load_text(root) if (root / "text.json").is_file() else (None, None)
    elif (root / "config.json").is_file():
        vision, text, tokenizer = _published(root)
    else:
        raise WeightsError(
            root, "holds no CLIP.", "A run's folder (vision.json) or a CLIPModel's (config.json)."
        )
    return CLIP(vision.to(place), None if text is None else text.to(place), tokenizer, name)


def _published(root: Path) -> tuple[VisionTower, TextTower | None, Tokenizer | None]:
    spec, tensors, _ = read_component(root, "vision")
    assert isinstance(spec, VisionSpec)
    assert tensors is not None
    with torch.device("meta"):
        vision = VisionTower(spec)
    load_into(vision, tensors, dtype=torch.float32)
    if not any(name.startswith("text_model.") for name in _raw_names(root)):
        return vision, None, None
    words, tensors, _ = read_component(root, "text")
    assert isinstance(words, TextSpec)
    assert tensors is not None
    with torch.device("meta"):
        text = TextTower(words)
    load_into(text, tensors, dtype=torch.float32)
    return vision, text, Tokenizer.from_folder(root)


def _raw_names(root: Path) -> Iterable[str]:
    tensors = read_component(root, "any")[1]
    return () if tensors is None else tensors
