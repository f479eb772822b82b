"""Training a small CLIP (Radford et al. 2021, figure 3) on still life.

Batches are made of groups of scenes that differ in one way each (see
:mod:`safelight.data.renders`), so that neither tower can match pictures and captions by
background or by one object alone.

Contrast alone teaches a small vision transformer slowly. Two auxiliary heads, thrown away after
training, help it: one names every attribute of the scene from either tower's embedding, so that
both learn one layout of the shared space; one names, for each patch of the picture, the object
it shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from safelight.data import stilllife
from safelight.data.attributes import ATTRIBUTE_CLASSES, attribute_classes
from safelight.data.renders import GROUP, open_labels
from safelight.data.stilllife import Scene
from safelight.errors import InvalidRequest
from safelight.nets.clip import TextTower, VisionTower
from safelight.parts import clip_normalised
from safelight.spec import TextSpec, VisionSpec
from safelight.text.tokenizer import Tokenizer, learn_vocabulary
from safelight.train.pictures import SPLITS, Stream, key, save_grid, validation
from safelight.train.processes import own_device
from safelight.train.recipe import Recipe


def attribute_targets(scenes: list[Scene]) -> Tensor:
    """``(N, 5)`` class numbers in the order of :data:`ATTRIBUTE_CLASSES`."""
    return torch.from_numpy(attribute_classes(scenes))


class AttributeHead(nn.Module):
    """From an embedding to logits for every attribute."""

    def __init__(self, width: int, hidden: int = 512) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, sum(ATTRIBUTE_CLASSES.values()))
        )

    def forward(self, embedding: Tensor) -> list[Tensor]:
        return list(self.layers(embedding).split(list(ATTRIBUTE_CLASSES.values()), dim=1))


def attribute_loss(logits: list[Tensor], targets: Tensor) -> Tensor:
    """Sum of the cross-entropies."""
    return torch.stack(
        [F.cross_entropy(part, targets[:, i]) for i, part in enumerate(logits)]
    ).sum()


def all_right(logits: list[Tensor], targets: Tensor) -> Tensor:
    """Which pictures have every attribute right, ``(N,)`` bool."""
    said = torch.stack([part.argmax(1) for part in logits], dim=1)
    return (said == targets).all(1)


PATCH_CLASSES = (3, len(stilllife.SHAPES) + 1, len(stilllife.COLOURS) + 1)
"""What a patch shows: neither, object a or object b; its shape; its colour (0: none)."""


def patch_targets(labels: np.ndarray, scenes: list[Scene]) -> Tensor:
    """Labels ``(N, P, P)`` of :func:`open_labels` to class numbers ``(N, P * P, 3)``."""
    table = stilllife.attribute_array(scenes)
    flat = labels.reshape(len(labels), -1).astype(np.int64)
    columns = [flat]
    for name in ("shape", "colour"):
        a, b = (table[:, stilllife.ATTRIBUTES.index(f"{name}_{x}")] for x in "ab")
        by_object = np.stack([np.zeros_like(a), a + 1, b + 1], axis=1)
        columns.append(np.take_along_axis(by_object, flat, axis=1))
    return torch.from_numpy(np.stack(columns, axis=2))


class Towers(nn.Module):
    """Both towers and the temperature."""

    def __init__(self, text: TextSpec, vision: VisionSpec) -> None:
        super().__init__()
        self.text, self.vision = TextTower(text), VisionTower(vision)
        self.logit_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
        self._heads(vision)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def _heads(self, vision: VisionSpec) -> None:
        """What is trained beside the towers, and thrown away."""

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image and text embeddings, and the temperature's scale."""
        text = self.text(ids).embedding
        assert text is not None
        return self.vision(pixels).embedding, text, self.scale()

    def scale(self) -> Tensor:
        return self.logit_scale.clamp(max=np.log(100.0)).exp()


class ContrastiveModel(Towers):
    """The towers with the auxiliary heads of still life."""

    def _heads(self, vision: VisionSpec) -> None:
        self.head = AttributeHead(vision.projection_width)
        self.patch_head = nn.Sequential(
            nn.LayerNorm(vision.width), nn.Linear(vision.width, sum(PATCH_CLASSES))
        )

    def forward(  # type: ignore[override]
        self, pixels: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Image and text embeddings, the temperature's scale, and the patch head's logits."""
        seen = self.vision(pixels)
        text = self.text(ids).embedding
        assert text is not None
        return seen.embedding, text, self.scale(), self.patch_head(seen.states[:, 1:])


def contrast(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric loss of a batch of pairs, and their similarities ``(N, N)``, scaled."""
    similarity = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    own = torch.arange(len(text), device=text.device)
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2, similarity


def matched(similarity: Tensor, captions: list[str]) -> float:
    """Share of pictures whose best caption is theirs, or says the same."""
    best = similarity.argmax(1).tolist()
    return sum(captions[b] == own for b, own in zip(best, captions, strict=True)) / len(captions)


def token_ids(tokenizer: Tokenizer, captions: list[str], eos_id: int) -> Tensor:
    """``(N, L)``, as long as the longest: attention is causal, so nothing after the end token
    reaches it, and the tail can go."""
    ids = torch.tensor(tokenizer.tokens(captions))
    return ids[:, : int((ids == eos_id).int().argmax(1).max()) + 1]


def write_towers(module: Towers, tokenizer: Tokenizer, folder: Path) -> None:
    """Both towers, their specs and the tokenizer."""
    for name, tower in (("text", module.text), ("vision", module.vision)):
        state = {k: v.contiguous() for k, v in tower.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(tower.spec.model_dump_json(indent=1))
    tokenizer.save(folder / "tokenizer")


class ContrastiveObjective:
    """See the file's head."""

    def __init__(self, recipe: Recipe) -> None:
        if recipe.clip is None:
            raise InvalidRequest("clip", "the recipe has no such section.")
        self.recipe, self.settings = recipe, recipe.clip
        vocab, merges = learn_vocabulary(stilllife.all_captions_corpus(20000, 0), 400)
        text = recipe.clip.text
        if len(vocab) != text.vocab_size:
            raise InvalidRequest(
                "clip.text.vocab_size", f"{text.vocab_size}, but the captions give {len(vocab)}."
            )
        self.tokenizer = Tokenizer.from_vocab(vocab, merges, context_length=text.context_length)
        torch.manual_seed(recipe.seed)
        self.module: ContrastiveModel = ContrastiveModel(text, recipe.clip.vision)
        self.stream, self.device = Stream(recipe.data, recipe.seed), own_device()
        data = recipe.data
        self.labels = open_labels(data.cache, seed=data.seed, split=data.split, count=data.count)

    def _ids(self, captions: list[str]) -> Tensor:
        return token_ids(self.tokenizer, captions, self.settings.text.eos_id).to(self.device)

    def data_digest(self) -> str:
        return self.stream.digest()

    def data_report(self) -> Mapping[str, Any]:
        return self.stream.report()

    def batch(self, start: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        places, flips = self.stream.places(start, count, group=GROUP)
        scenes = self.stream.seen_scenes(places, flips)
        seed = self.recipe.seed
        captions = [stilllife.caption(s, key(seed, start + i, 4)) for i, s in enumerate(scenes)]
        pixels = clip_normalised(self.stream.pixels(places, flips))
        labels = self.labels[places]
        labels[flips] = labels[flips][:, :, ::-1]
        for i in np.flatnonzero(flips):
            # A mirrored left/right scene names its left object first: the roles change too.
            if scenes[i].arrangement == stilllife.Arrangement.LEFT_RIGHT:
                labels[i] = np.array([0, 2, 1], dtype=np.uint8)[labels[i]]
        targets, patches = attribute_targets(scenes), patch_targets(labels, scenes)
        pixels, targets, patches = (t.to(self.device) for t in (pixels, targets, patches))
        return pixels, self._ids(captions), targets, patches

    def loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        pixels, ids, targets, patches = batch
        image, text, scale, patch_logits = module(pixels, ids)
        contrastive, similarity = contrast(image, text, scale)
        own = torch.arange(len(ids), device=ids.device)
        plain = getattr(module, "module", module)  # inside accelerate's wrapper
        assert isinstance(plain, ContrastiveModel)
        head = plain.head
        logits = head(image)
        attributes = attribute_loss(logits, targets)
        attributes_text = attribute_loss(head(text), targets)
        dense = torch.stack(
            [
                F.cross_entropy(part.flatten(0, 1), patches[..., i].flatten())
                for i, part in enumerate(patch_logits.split(PATCH_CLASSES, dim=2))
            ]
        ).sum()
        total = contrastive + self.settings.attribute_weight * (attributes + 0.5 * attributes_text)
        return total + self.settings.patch_weight * dense, {
            "contrast": float(contrastive.detach()),
            "top1": float((similarity.argmax(1) == own).float().mean()),
            "attributes": float(attributes.detach()),
            "attributes_text": float(attributes_text.detach()),
            "patches": float(dense.detach()),
            "all_right": float(all_right(logits, targets).float().mean()),
        }

    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """Matching within groups of 256, and the auxiliary head, on held-out pictures."""
        assert isinstance(module, ContrastiveModel)
        numbers = {}
        for split in SPLITS:
            pixels, scenes = validation(self.recipe.data, split, 512)
            captions = [stilllife.plain_caption(s) for s in scenes]
            seen = clip_normalised(pixels).to(self.device)
            image, text, scale, _ = module(seen, self._ids(captions))
            _, similarity = contrast(image, text, scale)
            numbers[f"top1_{split}"] = round(matched(similarity, captions), 4)
            right = all_right(module.head(image), attribute_targets(scenes).to(self.device))
            numbers[f"attributes_{split}"] = round(float(right.float().mean()), 4)
        return numbers

    def sample(self, module: nn.Module, path: Path) -> None:
        pixels, _ = validation(self.recipe.data, "combo", 12)
        save_grid([pixels], path)

    def export(self, module: nn.Module, folder: Path) -> None:
        """Writes both towers, their specs and the tokenizer."""
        assert isinstance(module, ContrastiveModel)
        write_towers(module, self.tokenizer, folder)
