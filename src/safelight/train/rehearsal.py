"""A recipe tried out at its real shapes, without its data and in miniature.

Networks keep their levels, layers, inputs and conditioning; only their widths shrink.
Pictures have the recipe's size, prompts their number of tokens, latents theirs. So a recipe for a
cluster meets on any machine, in seconds, nearly everything that it will meet there: fields that
do not go together, channels that do not add up, a teacher that does not fit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from safelight.data import stilllife
from safelight.errors import InvalidRequest
from safelight.nets.clip import TextTower, VisionTower
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.spec import ScheduleSpec, TextSpec, UNetSpec, VAESpec, VisionSpec
from safelight.text.tokenizer import Tokenizer, learn_vocabulary
from safelight.train.frozen import Frozen
from safelight.train.loop import adamw
from safelight.train.pictures import key
from safelight.train.recipe import DiffusionRecipe, Recipe
from safelight.train.tasks import TASKS

WIDTH = 8
"""Of everything: channels a level, tokens, embeddings."""
_PUBLISHED_FROM = 256
"""Pictures this large are a published model's: 77 tokens, its own autoencoder's depth."""


class RandomPictures:
    """Noise with made-up captions, of any size, as a source of pictures."""

    renders = None

    def __init__(self, size: int) -> None:
        self.size = size

    def digest(self) -> str:
        return "random"

    def report(self) -> dict[str, Any]:
        return {}

    def places(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(start, start + count), np.zeros(count, bool)

    def pixels(self, places: np.ndarray, flips: np.ndarray) -> Tensor:
        shape = (3, self.size, self.size)
        rows = [key(0, int(p), 1).random(shape, dtype=np.float32) for p in places]
        return torch.from_numpy(np.stack(rows)) * 2 - 1

    def captions(
        self,
        places: np.ndarray,
        flips: np.ndarray,
        rngs: list[np.random.Generator],
        *,
        plain: bool = False,
    ) -> list[str]:
        return [f"a red cube on top of a blue sphere, {p}" for p in places]

    def nearness(self, places: np.ndarray, flips: np.ndarray, side: int) -> Tensor:
        rows = [key(0, int(p), 2).random((side, side), dtype=np.float32) for p in places]
        return torch.from_numpy(np.stack(rows))

    def held_out(self, split: str, count: int) -> None:
        return None


def miniature(unet: UNetSpec) -> UNetSpec:
    """The same network with few channels, and one head a level."""
    levels = len(unet.channels)
    vector = 2 * WIDTH if unet.class_embedding == "projection" else unet.class_embedding_size
    return unet.replace(
        channels=(WIDTH,) * levels,
        heads=(1,) * levels,
        context_width=WIDTH,
        class_embedding_size=vector,
        norm_groups=4,
    )


def small_parts(size: int, factor: int) -> Frozen:
    """Random towers and an autoencoder that go with :func:`miniature`."""
    vocab, merges = _words()
    text = TextSpec(
        vocab_size=len(vocab),
        width=WIDTH,
        layers=1,
        heads=2,
        mlp_width=WIDTH,
        context_length=77 if size >= _PUBLISHED_FROM else 32,
        projection_width=WIDTH,
        bos_id=vocab["<|startoftext|>"],
        eos_id=vocab["<|endoftext|>"],
        pad_id=vocab["<|endoftext|>"],
    )
    vision = VisionSpec(
        image_size=56,
        patch_size=14,
        width=WIDTH,
        layers=1,
        heads=2,
        mlp_width=WIDTH,
        projection_width=WIDTH,
    )
    levels = factor.bit_length()
    vae = VAESpec(channels=(4,) * levels, layers_per_block=1, norm_groups=2, sample_size=size)
    tokenizer = Tokenizer.from_vocab(vocab, merges, context_length=text.context_length)
    return Frozen(VAE(vae), TextTower(text), tokenizer, VisionTower(vision))


@cache
def _words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    return learn_vocabulary([f"{stilllife.SHAPES} {stilllife.COLOURS}"], 20)


def factor_of(recipe: Recipe, settings: DiffusionRecipe) -> int:
    """Pixels a latent cell: from the sizes that the recipe names.

    Raises:
        InvalidRequest: they do not go together.
    """
    size = recipe.data.crop or recipe.data.size
    wanted = 4 if settings.task == "x4" else 8
    if size % wanted or (size // wanted) % 2 ** (len(settings.unet.channels) - 1):
        raise InvalidRequest("data.size", f"{size} pixels are no whole number of latent cells.")
    return wanted


def rehearse(
    recipe: Recipe,
    steps: int = 20,
    *,
    batch: int = 1,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Take some steps of a recipe in miniature; see the file's head.

    Args:
        batch: pictures a step.
        progress: called with every step's number and loss.

    Returns:
        the losses, one a step.

    Raises:
        InvalidRequest: the recipe does not hold together, or a loss is not finite.
    """
    with _objective(recipe) as objective:
        optimizer = adamw(objective.module, recipe.optim)
        made = []
        for step in range(steps):
            loss, _ = objective.loss(objective.module, objective.batch(step * batch, batch))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(objective.module.parameters(), recipe.optim.clip)
            optimizer.step()
            made.append(float(loss.detach()))
            if not np.isfinite(made[-1]):
                raise InvalidRequest("recipe", f"the loss is {made[-1]} at step {step}.")
            if progress is not None:
                progress(step, made[-1])
    return made


@contextmanager
def _objective(recipe: Recipe) -> Iterator[Any]:
    from safelight.train.latent import LatentDiffusionObjective
    from safelight.train.prior import PriorObjective

    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = recipe.data.size
        pictures: Any = RandomPictures(size)
        if recipe.prior is not None:
            prior = recipe.prior.prior.replace(
                heads=2, head_width=4, layers=2, embedding_width=WIDTH
            )
            settings = recipe.prior.replace(prior=prior)
            parts = small_parts(256 if prior.text_tokens == 77 else 64, 8)
            small = recipe.replace(prior=settings, start=None, compile=False)
            yield PriorObjective(small, frozen=parts, pictures=pictures)
            return
        if recipe.diffusion is None:
            raise InvalidRequest("recipe", f"{recipe.kind} recipes have no miniature.")
        parts = small_parts(size, factor_of(recipe, recipe.diffusion))
        small = _shrunk(recipe, recipe.diffusion, Path(folder))
        yield LatentDiffusionObjective(small, frozen=parts, pictures=pictures)


def _shrunk(recipe: Recipe, settings: DiffusionRecipe, folder: Path) -> Recipe:
    """The recipe with a small UNet, and small ones in the places of its start and teacher."""
    full = settings.unet
    changes: dict[str, Any] = {"compile": False, "precision": "float32"}
    unet = miniature(full)
    if recipe.start is not None:
        # What a run starts from lacks what the run adds: planes, vectors, the guidance scale.
        before = unet.replace(
            in_channels=full.in_channels - TASKS[settings.task].channels,
            class_embedding="none"
            if full.class_embedding == "projection"
            else full.class_embedding,
            class_embedding_size=0
            if full.class_embedding == "projection"
            else unet.class_embedding_size,
            guidance_embedding_size=0,
        )
        changes["start"] = _written(before, settings.prediction_type, folder / "start")
    if recipe.distill is not None:
        deeper = unet.replace(layers_per_block=2, guidance_embedding_size=0)
        teacher = _written(deeper, settings.prediction_type, folder / "teacher")
        changes["distill"] = recipe.distill.replace(teacher=teacher)
    return recipe.replace(diffusion=settings.replace(unet=unet), **changes)


def _written(spec: UNetSpec, kind: str, folder: Path) -> Path:
    """A random UNet as a run's folder."""
    folder.mkdir()
    state = {k: v.contiguous() for k, v in UNet(spec).state_dict().items()}
    save_file(state, folder / "unet.safetensors")
    (folder / "unet.json").write_text(spec.model_dump_json())
    schedule = ScheduleSpec.model_validate({"prediction_type": kind})
    (folder / "schedule.json").write_text(schedule.model_dump_json())
    return folder
