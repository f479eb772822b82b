"""Training the prior: a picture's CLIP embedding from its caption (Ramesh et al. 2022, section
2.2). The network says the clean, normalised embedding (x0) of a noised one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from safelight.diffusion import losses
from safelight.diffusion.schedule import Schedule
from safelight.errors import InvalidRequest
from safelight.nets.prior import Prior
from safelight.spec import ScheduleSpec
from safelight.train.frozen import Frozen, load_frozen
from safelight.train.latent import stratified_timesteps
from safelight.train.pictures import SPLITS, Pictures, key, open_pictures, save_grid
from safelight.train.processes import own_device
from safelight.train.recipe import Recipe

SCHEDULE = ScheduleSpec(
    kind="squared_cosine",
    prediction_type="x0",
    sampler="ddpm",
    steps_offset=0,
    final_alpha_one=True,
)


class Batch(NamedTuple):
    """Normalised embeddings ``(N, D)``, their noise and timesteps, and what the caption says."""

    embeddings: Tensor
    noise: Tensor
    t: Tensor
    text: tuple[Tensor, Tensor, Tensor]
    """Projected embedding ``(N, D)``, states ``(N, L, D)``, which tokens are not padding."""


class PriorObjective:
    """See the file's head; ``recipe.prior`` names the towers."""

    def __init__(
        self, recipe: Recipe, *, frozen: Frozen | None = None, pictures: Pictures | None = None
    ) -> None:
        if recipe.prior is None:
            raise InvalidRequest("prior", "the recipe has no such section.")
        self.recipe, self.settings = recipe, recipe.prior
        self.device = own_device()
        frozen = frozen or load_frozen(recipe.prior.clip, vision=True)
        self.frozen = frozen.to(self.device)
        self.schedule = Schedule.from_spec(SCHEDULE)
        self.pictures = open_pictures(recipe.data, recipe.seed) if pictures is None else pictures
        self.module: Prior = self._prior()

    def _prior(self) -> Prior:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            prior = Prior(self.settings.prior)
            nn.init.normal_(prior.positional_embedding, std=0.02)
            nn.init.normal_(prior.prd_embedding, std=0.02)
        if self.recipe.start is not None:
            from safelight.store.weights import load_into, read_weights

            file = self.recipe.start / "prior.safetensors"
            load_into(prior, read_weights(file), dtype=torch.float32)
            prior.requires_grad_(True)
            for spread in (prior.clip_mean, prior.clip_std):
                spread.requires_grad_(False)
        else:
            rows = [self._seen(*self.pictures.places(i, 64)) for i in range(0, 2048, 64)]
            seen = torch.cat(rows)
            prior.clip_mean.data = seen.mean(0, keepdim=True).cpu()
            prior.clip_std.data = seen.std(0, keepdim=True).cpu()
        return prior

    def _seen(self, places: np.ndarray, flips: np.ndarray, pictures: Any = None) -> Tensor:
        return self.frozen.look((pictures or self.pictures).pixels(places, flips)).float()

    def _normalised(self, seen: Tensor) -> Tensor:
        return (seen - self.module.clip_mean.to(seen)) / self.module.clip_std.to(seen)

    def _read(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        states, embedding, mask = self.frozen.reading(captions)
        if embedding is None:
            raise InvalidRequest("prior.clip", "this text tower has no projection.")
        return embedding, states, mask

    def data_digest(self) -> str:
        return self.pictures.digest()

    def data_report(self) -> Mapping[str, Any]:
        return self.pictures.report()

    def batch(self, start: int, count: int) -> Batch:
        places, flips = self.pictures.places(start, count)
        seed = self.recipe.seed
        rngs = [key(seed, start + i, 3) for i in range(count)]
        seen = self._normalised(self._seen(places, flips))
        rows = [r.standard_normal(seen.shape[1], dtype=np.float32) for r in rngs]
        gone = [r.random() < self.settings.drop_caption for r in rngs]
        said = self.pictures.captions(places, flips, rngs)
        captions = ["" if g else s for g, s in zip(gone, said, strict=True)]
        t = stratified_timesteps(start, count, self.schedule.steps, seed)
        noise = torch.from_numpy(np.stack(rows)).to(seen)
        return Batch(seen, noise, t.to(self.device), self._read(captions))

    def loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        return self._error(module, batch).mean().float(), {}

    def _error(self, module: nn.Module, batch: Batch) -> Tensor:
        return losses.diffusion_loss(
            lambda x, t: module(x, t, *batch.text),
            batch.embeddings,
            batch.noise,
            batch.t,
            self.schedule,
            reduction="none",
        )

    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """The loss on held-out pictures, and the cosine of what the caption alone says (one step
        from pure noise) with the picture's embedding."""
        numbers: dict[str, float] = {}
        for split in SPLITS[:2]:
            pictures = self.pictures.held_out(split, 512)
            if pictures is None:
                continue
            batch = self._held_out(pictures, 512)
            numbers[f"loss_{split}"] = round(float(self._error(module, batch).mean()), 5)
            said = self._from_noise(module, batch)
            alike = F.cosine_similarity(said, batch.embeddings).mean()
            numbers[f"cosine_{split}"] = round(float(alike), 4)
        return numbers

    def _held_out(self, pictures: Pictures, count: int) -> Batch:
        places, flips = np.arange(count), np.zeros(count, bool)
        parts = [slice(i, min(i + 64, count)) for i in range(0, count, 64)]
        seen = torch.cat([self._seen(places[p], flips[p], pictures) for p in parts])
        rng = key(0, 0, 6)
        noise = torch.from_numpy(rng.standard_normal(seen.shape, dtype=np.float32)).to(seen)
        t = stratified_timesteps(0, count, self.schedule.steps, 0).to(self.device)
        captions = pictures.captions(places, flips, [rng] * count)
        return Batch(self._normalised(seen), noise, t, self._read(captions))

    def _from_noise(self, module: nn.Module, batch: Batch) -> Tensor:
        last = torch.full_like(batch.t, self.schedule.steps - 1)
        return module(batch.noise, last, *batch.text)

    def sample(self, module: nn.Module, path: Path) -> None:
        """12 held-out pictures, and for each caption the picture, of 512, whose embedding is
        nearest to what the prior says."""
        pictures = self.pictures.held_out("combo", 512)
        if pictures is None:
            return
        batch = self._held_out(pictures, 512)
        said = self._from_noise(module, batch)[:12]
        alike = F.normalize(said, dim=1) @ F.normalize(batch.embeddings, dim=1).T
        nearest = alike.argmax(1).cpu().numpy()
        straight = np.zeros(12, bool)
        shown = [pictures.pixels(rows, straight) for rows in (np.arange(12), nearest)]
        save_grid(shown, path)

    def export(self, module: nn.Module, folder: Path) -> None:
        """Writes ``prior.safetensors`` and ``prior.json``."""
        state = {k: v.contiguous() for k, v in module.state_dict().items()}
        save_file(state, folder / "prior.safetensors")
        (folder / "prior.json").write_text(self.settings.prior.model_dump_json(indent=1))
