"""Personalisation: DreamBooth, LoRA and textual inversion, on the one training loop.

The loss is the plain one of latent diffusion on the subject's pictures, and with prior
preservation (Ruiz et al. 2023, 2208.12242, equation 2) ``prior_loss_weight`` times the same on
pictures of its class that the model itself made before:

    mean |target - f(x_t, t, prompt)|² + weight * mean |target' - f(x'_t', t', class prompt)|²

What trains is a learner (:mod:`safelight.train.learners`). Samples are made by the engine that
generates: this package may not import it, so it is handed in as a function. Everything random of a
picture is keyed by (seed, its number in the run); beside every picture of the subject stands one
of the class.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from safelight.diffusion import losses
from safelight.errors import InvalidRequest
from safelight.model import Model
from safelight.nets.vae import Posterior
from safelight.runtime.training import hasten
from safelight.train.class_pictures import Render, fill
from safelight.train.copying import Alarm, embedder
from safelight.train.latent import stratified_timesteps
from safelight.train.learners import DreamBooth, Inversion, Learner, LowRank
from safelight.train.personal_recipe import PersonalRecipe
from safelight.train.photos import Photos, Sight
from safelight.train.pictures import key, save_grid, to_pixels
from safelight.train.processes import own_device
from safelight.train.recipe import Recipe
from safelight.train.remember import forget_activations

log = logging.getLogger(__name__)

_SUBJECT, _CLASS = 11, 14  # first streams of random numbers: order, sight, noise

TEMPLATES = {
    "object": (
        *("{}", "a {}", "the {}", "one {}", "a photo of a {}", "a photo of the {}"),
        *("a picture of a {}", "a picture of the {}", "a close-up of a {}", "a rendering of a {}"),
        *("a photo of a small {}", "a photo of a large {}"),
    ),
    "style": (
        *("a picture in the style of {}", "a painting in the style of {}", "a drawing by {}"),
        *("a rendering in the style of {}", "a picture, {}", "a detail in the style of {}"),
    ),
}
"""Sentences that a new word is learned in (Gal et al. 2022, section 3 and appendix)."""


class Batch(NamedTuple):
    """The subject's pictures, then as many of the class."""

    latents: Tensor
    noise: Tensor
    t: Tensor
    ids: Tensor
    """``(N, L)`` token ids."""
    subjects: int
    """Rows that show the subject."""


class PersonalObjective:
    """See the file's head.

    Args:
        render: makes the class pictures and the samples; without it there are no samples, and
            class pictures must be there.
        model: given instead of the one that the recipe names.

    Raises:
        InvalidRequest: pictures, prompts or model do not go together; before anything is trained.
    """

    module: nn.Module

    def __init__(
        self, recipe: Recipe, render: Render | None = None, *, model: Model | None = None
    ) -> None:
        if recipe.personal is None:
            raise InvalidRequest("personal", "the recipe has no such section.")
        self.recipe, self.settings, self.render = recipe, recipe.personal, render
        settings = self.settings
        if not settings.instance_data.is_dir():  # before a model is loaded
            Photos(settings.instance_data, 8)
        _same_run(recipe)
        self.device = own_device()  # what is frozen lies where accelerate will train
        if model is None:
            model = Model.load(settings.model, device=self.device, dtype=torch.float32)
        self.base, self.schedule = model, model.schedule
        size = _size(settings, model)
        random_crop = settings.crop == "random"
        self.subject = Photos(
            settings.instance_data, size, random_crop=random_crop, flip=settings.flip
        )
        self.learner = self._learner()
        self._tokenizer = _reader(self.learner, model)
        self.prompts = settings.validation_prompts or self._prompts()[:1]
        self._check_length()
        self.classes = self._class_pictures(size) if settings.class_prompts else None
        self._encoded: dict[tuple[str, int, bool], Posterior] = {}
        for network in self.learner.frozen:
            if self.device.type == "cpu":
                hasten(network, kernels=not recipe.compile)
            if recipe.gradient_checkpointing:
                forget_activations(network)
        self.module = self.learner
        self.alarm: Alarm | None = None
        if render is not None:
            self.alarm = Alarm(self.subject.all(), embedder(settings, model))
        self._samples = np.empty((0, size, size, 3), np.uint8)

    # -- what is trained ------------------------------------------------------------------------

    def _learner(self) -> Learner:
        settings, model = self.settings, self.base
        if settings.method == "dreambooth":
            words = re.findall(r"[a-z]+", settings.instance_prompt.lower())
            return DreamBooth(model, settings, self.recipe.name, tuple(words))
        if settings.method == "lora":
            return LowRank(model, settings, self.recipe.seed)
        assert model.tokenizer is not None
        known = model.tokenizer.vocab
        if settings.token in known or f"{settings.token}</w>" in known:
            raise InvalidRequest(
                "token", f"{settings.token!r} is a word of the model's already.",
                "Choose one that nobody writes, such as <my-dog>.",
            )  # fmt: skip
        ids = model.tokenizer.encode(settings.initializer)
        if len(ids) != 1:
            raise InvalidRequest(
                "initializer",
                f"{settings.initializer!r} is {len(ids)} tokens for this model, not one.",
                "Choose a plainer word.",
            )
        return Inversion(model, settings, ids[0])

    def _prompts(self) -> tuple[str, ...]:
        """What the subject's pictures are said to show."""
        settings = self.settings
        if settings.method != "textual_inversion":
            return (settings.instance_prompt,)
        templates = settings.templates or TEMPLATES[settings.learnable]
        return tuple(template.format(settings.token) for template in templates)

    def _check_length(self) -> None:
        room = self._tokenizer.context_length - 2
        mine = "templates" if self.settings.method == "textual_inversion" else "instance_prompt"
        said = [(mine, prompt) for prompt in self._prompts()]
        said += [("class_prompt", prompt) for prompt in self.settings.class_prompts]
        for field, prompt in said:
            if (count := self._tokenizer.count(prompt)) > room:
                raise InvalidRequest(
                    field, f"a prompt of {count} tokens; {room} can be read.",
                    "Say it in fewer words.",
                )  # fmt: skip

    # -- pictures -------------------------------------------------------------------------------

    def _class_pictures(self, size: int) -> Photos:
        """Pictures of the class; the model makes those that are missing."""
        settings = self.settings
        folder = settings.class_data or self.recipe.output / "class-pictures"
        fill(folder, settings, self.base, self.render)
        return Photos(
            folder,
            size,
            random_crop=settings.crop == "random",
            flip=settings.flip,
            most=settings.num_class_images,
            field="class_data",
        )

    def data_digest(self) -> str:
        """Of the pictures' files."""
        parts = [self.subject.digest, *([self.classes.digest] if self.classes else ())]
        return "-".join(parts)

    def data_report(self) -> Mapping[str, Any]:
        return {}

    @torch.no_grad()
    def _posterior(self, kind: str, photos: Photos, sight: Sight) -> Posterior:
        """What the autoencoder says of a picture, alone so that it is always the same; kept where
        the picture is not cut anew each time."""
        name = kind, sight.place, sight.mirrored
        if sight.where is not None or name not in self._encoded:
            vae = self.base.vae
            place = next(vae.parameters()).device
            found = vae.encode(to_pixels(photos.pixels(sight)[None]).to(place))
            if sight.where is not None:
                return found
            self._encoded[name] = found
        return self._encoded[name]

    def _rows(
        self,
        photos: Photos,
        start: int,
        count: int,
        stream: int,
        prompts: Callable[[int, np.random.Generator], str],
    ) -> Batch:
        """Pictures ``start`` to ``start + count`` of the run, from one folder; ``prompts`` says
        what a picture of it shows."""
        seed, strength = self.recipe.seed, self.settings.offset_noise
        latents, noises, said = [], [], []
        for index in range(start, start + count):
            sight = photos.sight(index, seed, stream)
            posterior = self._posterior(str(stream), photos, sight)
            rng, shape = key(seed, index, stream + 2), posterior.mean.shape
            spread, noise = (_normal(rng, shape) for _ in range(2))
            latents.append(posterior.sample(spread.to(posterior.mean)))
            said.append(prompts(sight.place, rng))
            if strength:
                noise = losses.offset_noise(noise, _normal(rng, shape[:2]), strength)
            noises.append(noise)
        t = stratified_timesteps(start, count, self.schedule.steps, seed + stream - _SUBJECT)
        ids = torch.tensor(self._tokenizer.tokens(said))
        scaled = torch.cat(latents) * self.base.vae.spec.scaling_factor
        parts = [p.to(self.device) for p in (scaled, torch.cat(noises), t, ids)]
        return Batch(*parts, subjects=count)

    def batch(self, start: int, count: int) -> Batch:
        known = self._prompts()
        rows = self._rows(
            self.subject, start, count, _SUBJECT, lambda _, rng: known[rng.integers(len(known))]
        )
        classes, named = self.classes, self.settings.class_prompts
        if classes is None:
            return rows
        prior = self._rows(
            classes, start, count, _CLASS, lambda place, _: classes.caption(place) or named[0]
        )
        both = (torch.cat(pair) for pair in zip(rows[:4], prior[:4], strict=True))
        return Batch(*both, subjects=count)

    # -- the loss -------------------------------------------------------------------------------

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        """Ruiz et al. 2023, equation 2: see the file's head."""
        settings, schedule = self.settings, self.schedule
        error = losses.diffusion_loss(
            lambda x, t: module(x.to(memory_format=torch.channels_last), t, batch.ids),
            batch.latents,
            batch.noise,
            batch.t,
            schedule,
            reduction="none",
        )
        mine, prior = error[: batch.subjects], error[batch.subjects :]
        abar = schedule.alpha_bar(batch.t[: batch.subjects])
        kind, gamma = schedule.prediction_type, settings.min_snr_gamma
        mine = mine * losses.weights(settings.weighting, abar, kind, gamma=gamma).to(mine)
        total = mine.mean()
        logged = {"subject": float(mine.detach().mean())}
        if len(prior):
            total = total + settings.prior_loss_weight * prior.mean()
            logged["prior"] = float(prior.detach().mean())
        return total.float(), logged

    # -- what is seen ---------------------------------------------------------------------------

    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """Samples of the held-out prompts, and how near they are to the subject's pictures."""
        assert isinstance(module, Learner)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        networks = (self.base.unet, self.base.text)
        whole = sum(p.numel() for network in networks if network for p in network.parameters())
        numbers = {"trained_percent": round(100 * trained / whole, 4)}
        if self.render is None or self.alarm is None:
            return numbers
        each = self.settings.validation_images
        prompts = [prompt for prompt in self.prompts for _ in range(each)]
        seeds = list(range(each)) * len(self.prompts)
        made = self.render(module.model(), prompts, seeds)
        self._samples = np.stack([_square(p, self.subject.size) for p in made])
        return numbers | self._compare(prompts, seeds)

    def _compare(self, prompts: list[str], seeds: list[int]) -> dict[str, float]:
        """The alarm: warns, and writes ``copying.json``."""
        assert self.alarm is not None
        found, names = self.alarm.look(self._samples), self.subject.names
        rows = [
            {
                "prompt": prompt,
                "seed": seed,
                "copies": None if seen.copied is None else names[seen.copied],
                **{
                    measure: {"nearest": names[place], "distance": round(distance, 4)}
                    for measure, (place, distance) in seen.nearest.items()
                },
            }
            for prompt, seed, seen in zip(prompts, seeds, found, strict=True)
        ]
        copies = sum(seen.copied is not None for seen in found)
        numbers = {
            f"nearest_{measure}": round(min(seen.nearest[measure][1] for seen in found), 4)
            for measure in self.alarm.limits
        }
        likeness = self.alarm.likeness(self._samples)
        if likeness is not None:
            numbers["likeness"] = round(likeness, 4)
        numbers["copies"] = copies
        record = {"limits": self.alarm.limits, "copies": copies, "samples": rows}
        (self.recipe.output / "copying.json").write_text(json.dumps(record, indent=1) + "\n")
        if copies:
            log.warning(
                "%d of %d samples copy a training picture (copying.json says which): stop earlier, "
                "lower the rate, or add pictures and a class prompt",
                copies,
                len(rows),
            )
        return numbers

    def sample(self, module: nn.Module, path: Path) -> None:
        """A row a held-out prompt, of the samples that were just compared."""
        if not len(self._samples):
            return
        each = self.settings.validation_images
        rows = [to_pixels(self._samples[i : i + each]) for i in range(0, len(self._samples), each)]
        save_grid(rows, path, scale=1)

    def export(self, module: nn.Module, folder: Path) -> None:
        assert isinstance(module, Learner)
        module.write(folder)


def _size(settings: PersonalRecipe, model: Model) -> int:
    """Side of the training pictures.

    Raises:
        InvalidRequest: the model reads no text alone, or the size is not one of its own.
    """
    spec = model.spec
    alone = spec.unet.in_channels == spec.unet.out_channels and spec.unet.class_embedding == "none"
    if model.text is None or model.tokenizer is None or not alone:
        raise InvalidRequest(
            "model", f"{spec.name} is of the family {spec.family}.", "Start from text-to-image."
        )
    size = settings.resolution or spec.native_size
    cell = spec.vae.factor * 2 ** (len(spec.unet.channels) - 1)
    if size % cell:
        raise InvalidRequest(
            "resolution", f"{size} pixels are no whole number of cells.",
            f"A multiple of {cell}; {spec.name} was made for {spec.native_size}.",
        )  # fmt: skip
    return size


def _reader(learner: Learner, model: Model) -> Any:
    """The tokenizer, with the new word where there is one."""
    assert model.tokenizer is not None
    assert model.text is not None
    if not isinstance(learner, Inversion):
        return model.tokenizer
    first = model.text.text_model.embeddings.token_embedding.weight.shape[0]
    settings = learner.settings
    return model.tokenizer.with_words(
        {settings.token: list(range(first, first + settings.vectors))}
    )


def _same_run(recipe: Recipe) -> None:
    """Refuse to go on with what another recipe began."""
    file = recipe.output / "manifest.json"
    if not file.is_file() or not any(recipe.output.glob("checkpoint*.pt")):
        return
    before = json.loads(file.read_text())["recipe"].get("personal") or {}
    now = recipe.personal.model_dump(mode="json") if recipe.personal else {}
    free = {"validation_prompts", "validation_images", "clip", "half"}
    if changed := sorted(k for k in now if k not in free and before.get(k) != now[k]):
        raise InvalidRequest(
            "output", f"{recipe.output} holds a run with another {', '.join(changed)}.",
            "Choose another folder, or delete that one.",
        )  # fmt: skip


def _normal(rng: np.random.Generator, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def _square(picture: Image.Image | None, size: int) -> np.ndarray:
    """A sample at the training pictures' size; one that was withheld is grey."""
    if picture is None:
        return np.full((size, size, 3), 128, np.uint8)
    return np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BOX), np.uint8)
