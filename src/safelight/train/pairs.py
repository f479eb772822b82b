"""Training a CLIP on pictures and captions of one's own (Radford et al. 2021, figure 3).

Contrast between the pairs of a batch and nothing beside it: still life's auxiliary heads need
scenes that are known. The vocabulary is given, or learned from the captions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safelight.errors import InvalidRequest
from safelight.parts import clip_normalised
from safelight.text.tokenizer import Tokenizer, byte_symbols, learn_vocabulary
from safelight.train.contrastive import Towers, contrast, matched, token_ids, write_towers
from safelight.train.pictures import Captioned, Pictures, key, open_pictures, save_grid
from safelight.train.processes import own_device
from safelight.train.recipe import CLIPRecipe, Recipe

_SHOWN = 256


class PairsObjective:
    """See the file's head; ``recipe.clip`` describes the towers."""

    def __init__(self, recipe: Recipe) -> None:
        if recipe.clip is None:
            raise InvalidRequest("clip", "the recipe has no such section.")
        self.recipe, self.settings = recipe, recipe.clip
        side = recipe.clip.vision.image_size
        if recipe.data.size != side:
            raise InvalidRequest("data.size", f"{recipe.data.size}, but clip.vision sees {side}.")
        if recipe.data.captions != "need":
            raise InvalidRequest("data.captions", "a CLIP needs every picture's.", "need")
        self.pictures, self.device = open_pictures(recipe.data, recipe.seed), own_device()
        assert isinstance(self.pictures, Captioned)
        self.tokenizer = _tokenizer(self.settings, self.pictures)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.module = Towers(recipe.clip.text, recipe.clip.vision)

    def data_digest(self) -> str:
        return self.pictures.digest()

    def data_report(self) -> Mapping[str, Any]:
        return self.pictures.report()

    def batch(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        rngs = [key(self.recipe.seed, start + i, 4) for i in range(count)]
        return self._pairs(self.pictures, *self.pictures.places(start, count), rngs)[:2]

    def _pairs(
        self,
        pictures: Pictures,
        places: np.ndarray,
        flips: np.ndarray,
        rngs: list[np.random.Generator],
    ) -> tuple[Tensor, Tensor, list[str]]:
        captions = pictures.captions(places, flips, rngs)
        ids = token_ids(self.tokenizer, captions, self.settings.text.eos_id)
        pixels = clip_normalised(pictures.pixels(places, flips))
        return pixels.to(self.device), ids.to(self.device), captions

    def loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        loss, similarity = contrast(*module(*batch))
        own = torch.arange(len(similarity), device=similarity.device)
        return loss, {"top1": float((similarity.argmax(1) == own).float().mean())}

    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """The loss, and how many of 256 held-out pictures find their caption among all of them."""
        found = self._held_out(module, _SHOWN)
        if found is None:
            return {}
        loss, similarity, captions = found
        right = matched(similarity, captions)
        return {"loss_val": round(float(loss), 5), "top1_val": round(right, 4)}

    @torch.no_grad()
    def _held_out(self, module: nn.Module, count: int) -> tuple[Tensor, Tensor, list[str]] | None:
        pictures = self.pictures.held_out("val", count)
        if pictures is None:
            return None
        places, flips = np.arange(count), np.zeros(count, bool)
        pixels, ids, captions = self._pairs(pictures, places, flips, [key(0, 0, 6)] * count)
        parts = [module(p, i) for p, i in zip(pixels.split(64), ids.split(64), strict=True)]
        image, text = (torch.cat([part[k] for part in parts]) for k in (0, 1))
        return *contrast(image, text, parts[0][2]), captions

    def sample(self, module: nn.Module, path: Path) -> None:
        """12 held-out pictures, and below each the one that its caption finds among 256."""
        pictures, found = self.pictures.held_out("val", _SHOWN), self._held_out(module, _SHOWN)
        if pictures is None or found is None:
            return
        nearest = found[1].argmax(0).cpu().numpy()[:12]
        straight = np.zeros(12, bool)
        save_grid([pictures.pixels(rows, straight) for rows in (np.arange(12), nearest)], path)

    def export(self, module: nn.Module, folder: Path) -> None:
        """Writes both towers, their specs and the tokenizer."""
        assert isinstance(module, Towers)
        write_towers(module, self.tokenizer, folder)


def _tokenizer(settings: CLIPRecipe, pictures: Captioned) -> Tokenizer:
    """The vocabulary that a recipe names, or one of the captions' own words.

    Raises:
        InvalidRequest: it is not the one that the text tower was described for.
    """
    text, corpus = settings.text, pictures.corpus()  # no captions: said before anything else
    if settings.tokenizer is not None:
        made = Tokenizer.from_folder(settings.tokenizer)
    else:
        merges = max(0, text.vocab_size - 2 * len(byte_symbols()) - 2)
        vocab, learned = learn_vocabulary(corpus, merges)
        made = Tokenizer.from_vocab(vocab, learned, context_length=text.context_length)
    have = {"vocab_size": made.vocab_size, "bos_id": made.bos_id, "eos_id": made.eos_id}
    said = {name: getattr(text, name) for name in have}
    if said != have:
        write = ", ".join(f"{name} = {value}" for name, value in have.items())
        raise InvalidRequest(
            "clip.text.vocab_size", f"{said} does not go with the vocabulary.", f"Write {write}."
        )
    if settings.tokenizer is not None:
        made = Tokenizer.from_folder(settings.tokenizer, pad_id=text.pad_id)
        made.context_length = text.context_length
    return made
