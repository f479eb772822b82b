"""Training a UNet in latent space (Rombach et al. 2022, equation 3).

Autoencoder and towers are frozen. What the UNet is told is a task (:mod:`safelight.train.tasks`);
what a teacher adds is a lesson (:mod:`safelight.train.distill`); the rest is here, once. Latents of
the still life are computed once, of every render and of its mirror image: the autoencoder pads
asymmetrically, so latents themselves must never be flipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from safelight.diffusion import grid, guidance, losses, solvers
from safelight.diffusion.noise import initial_noise
from safelight.diffusion.schedule import Schedule
from safelight.errors import InvalidRequest
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.spec import ScheduleSpec
from safelight.train.distill import Lesson, lesson
from safelight.train.frozen import Frozen, load_denoiser, load_frozen
from safelight.train.pictures import SPLITS, Pictures, key, open_pictures, save_grid, to_pixels
from safelight.train.processes import own_device
from safelight.train.recipe import Recipe
from safelight.train.tasks import TASKS, Batch, Draw, Told, UnCLIP, predict
from safelight.train.warm import warm_start

_GOLDEN = 0.6180339887498949


def encode_all(
    vae: VAE, renders: np.ndarray, path: Path, *, half: bool = False, batch: int = 64
) -> np.ndarray:
    """Scaled latent means of every render and of its mirror image, cached at ``path``.

    The posterior's own spread is under 2 % of the latents' here and is left out.

    Args:
        half: encode in bfloat16, whose rounding is smaller than that spread.

    Returns:
        float16 ``(2, len(renders), C, h, w)``: as drawn, mirrored.
    """
    if not path.exists():
        side = renders.shape[1] // vae.spec.factor
        shape = (2, len(renders), vae.spec.latent_channels, side, side)
        part = path.with_suffix(".part")
        out = np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape)
        with torch.inference_mode():
            for start in range(0, len(renders), batch):
                pixels = to_pixels(np.array(renders[start : start + batch])).contiguous(
                    memory_format=torch.channels_last
                )
                for mirrored in (0, 1):
                    seen = pixels.flip(-1) if mirrored else pixels
                    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=half):
                        mean = vae.encode(seen).mean.float()
                    latents = mean * vae.spec.scaling_factor
                    out[mirrored, start : start + len(pixels)] = latents.numpy()
        out.flush()
        part.rename(path)
    return np.load(path, mmap_mode="r")


def stratified_timesteps(
    start: int, count: int, steps: int, seed: int, power: float = 1.0
) -> Tensor:
    """One timestep a picture in 0..steps-1, evenly spread over neighbours.

    A golden-ratio sequence over the picture's index in the run: every batch covers all noise
    levels, which lowers the variance of the gradient without changing its mean.

    Args:
        power: 1 is uniform; below 1 favours high noise, where layout and colour are decided
            (a level's quantile is ``u ** power``).
    """
    shift = key(seed, 0, 5).random()
    place = (shift + _GOLDEN * np.arange(start, start + count)) % 1.0
    return torch.from_numpy((place**power * steps).astype(np.int64))


class LatentDiffusionObjective:
    """See the file's head; ``recipe.diffusion`` names the frozen parts.

    Args:
        frozen, pictures: given instead of those the recipe names (rehearsals, tests).
    """

    def __init__(
        self, recipe: Recipe, *, frozen: Frozen | None = None, pictures: Pictures | None = None
    ) -> None:
        if recipe.diffusion is None:
            raise InvalidRequest("diffusion", "the recipe has no such section.")
        self.recipe, self.settings = recipe, recipe.diffusion
        settings, kind = recipe.diffusion, TASKS[recipe.diffusion.task]
        self.device = own_device()
        if frozen is None:
            text = settings.task != "variations"
            frozen = load_frozen(settings.clip, settings.vae, text=text, vision=kind.looks)
        self.frozen = frozen.to(self.device)
        self.task = kind(settings, self.frozen)
        self._check_buckets()
        self.spec = ScheduleSpec(prediction_type=settings.prediction_type)
        self.schedule = Schedule.from_spec(self.spec)
        if pictures is None:
            pictures = open_pictures(recipe.data, recipe.seed, recipe.optim.batch)
        self.pictures = pictures
        self.module: UNet = self._unet()
        self.lesson: Lesson | None = None
        if recipe.distill is not None:
            self.lesson = lesson(recipe, self.module, self.schedule, self.device)
        self.latents = self._latents_of_all()
        if isinstance(self.task, UnCLIP):
            self._measure_embeddings(self.task)

    def _check_buckets(self) -> None:
        """Refuse shapes that the UNet would not bring back to their size."""
        buckets, vae = self.recipe.data.buckets, self.frozen.vae
        if buckets is None or vae is None:
            return
        cell = vae.spec.factor * 2 ** (len(self.settings.unet.channels) - 1)
        if buckets.step % cell:
            raise InvalidRequest(
                "data.buckets.step", f"{buckets.step} is no multiple of this network's {cell}."
            )

    def _unet(self) -> UNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            unet = UNet(self.settings.unet)
        if self.recipe.start is not None:
            old, _ = load_denoiser(self.recipe.start)
            warm_start(unet, old.state_dict(), old.spec)
        else:
            # The last convolution starts at zero: the first prediction is the mean, not noise.
            nn.init.zeros_(unet.conv_out.weight)
        if self.settings.train == "cross_attention":
            for name, weight in unet.named_parameters():
                weight.requires_grad_(".attn2." in name)
        return unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _latents_of_all(self) -> np.ndarray | None:
        """Precomputed latents where pictures are fixed and whole."""
        data, vae = self.recipe.data, self.frozen.vae
        if self.pictures.renders is None or data.crop or vae is None:
            return None
        name = f"latents-{data.split}-{data.seed}-{data.size}px-{data.count}"
        half = self.recipe.precision == "bfloat16"
        path = data.cache / f"{name}-{self._vae_digest()}{'-half' if half else ''}.npy"
        vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return encode_all(vae, self.pictures.renders, path, half=half)

    def _vae_digest(self) -> str:
        file = self.settings.vae / "vae.safetensors"
        if not file.is_file():
            return self.frozen.digest("vae")
        return hashlib.blake2b(file.read_bytes()).hexdigest()[:12]

    def _measure_embeddings(self, task: UnCLIP) -> None:
        """The spread of the training set's embeddings, from some of its pictures."""
        rows = []
        data = self.recipe.data
        count = min(64 if data.buckets is None else self.recipe.optim.batch, data.count)
        for start in range(0, min(2048, data.count), count):
            places, flips = self.pictures.places(start, count)
            draw = Draw(self.pictures, places, flips, [], [], np.zeros(0, bool), shown=True)
            rows.append(self.frozen.look(draw.pixels, antialias=self.settings.antialias))
        seen = torch.cat(rows).float()
        task.mean, task.std = seen.mean(0, keepdim=True), seen.std(0, keepdim=True)

    def data_digest(self) -> str:
        return self.pictures.digest()

    def data_report(self) -> Mapping[str, Any]:
        return self.pictures.report()

    def batch(self, start: int, count: int) -> Batch:
        seed, settings = self.recipe.seed, self.settings
        places, flips = self.pictures.places(start, count)
        draw = Draw(
            self.pictures,
            places,
            flips,
            [key(seed, start + i, 3) for i in range(count)],
            [key(seed, start + i, 8) for i in range(count)],
            np.zeros(count, bool),
            crop=self.recipe.data.crop,
        )
        latents = self._latents(draw)
        shape = latents.shape[1:]
        rows = [r.standard_normal(shape, dtype=np.float32) for r in draw.rngs]
        noise = torch.from_numpy(np.stack(rows))
        draw.dropped = np.array([r.random() < settings.drop_caption for r in draw.rngs])
        told = self.task.told(draw)
        if settings.offset_noise:
            noise = losses.offset_noise(noise, draw.normal(shape[0]), settings.offset_noise)
        seen = noise
        if settings.input_perturbation:
            extra = draw.normal(*shape)
            seen = losses.perturbed_noise(noise, extra, settings.input_perturbation)
        steps, power = self.schedule.steps, settings.timestep_power
        t = stratified_timesteps(start, count, steps, seed, power)
        scale = torch.tensor([r.random() for r in draw.extra], dtype=torch.float32)
        place = self.device
        latents, noise, t = (part.to(place) for part in (latents, noise, t))
        return Batch(latents, noise, t, told.to(place), seen.to(place), scale.to(place))

    def _latents(self, draw: Draw) -> Tensor:
        if self.latents is None:
            pixels = draw.pixels
            noise = None
            if not draw.shown:
                spec = self.frozen.vae.spec  # type: ignore[union-attr]
                height, width = (side // spec.factor for side in pixels.shape[-2:])
                noise = draw.normal(spec.latent_channels, height, width)
            return self.frozen.encode(pixels, noise)
        order = np.lexsort((draw.places, draw.flips))
        latents = np.empty((len(order), *self.latents.shape[2:]), dtype=np.float32)
        for i in order:
            latents[i] = self.latents[int(draw.flips[i]), draw.places[i]]
        return torch.from_numpy(latents)

    def loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        if self.lesson is None:
            error, logged = self.error(module, batch), {}
        else:
            error, logged = self.lesson.error(self, module, batch)
        high = batch.t >= 3 * self.schedule.steps // 4
        high_noise = {"high_noise": float(error.detach()[high].mean())} if high.any() else {}
        return error.mean().float(), {**high_noise, **logged}

    def error(
        self,
        module: nn.Module,
        batch: Batch,
        *,
        answer: Callable[[Tensor, Tensor], Tensor] | None = None,
        plain: bool = False,
    ) -> Tensor:
        """The weighted squared error of each picture, ``(N,)``.

        Args:
            answer: asks the network instead, and may look at what it says.
            plain: without the recipe's weighting, for validation.
        """
        return losses.diffusion_loss(
            answer or (lambda x, t: predict(module, x, t, batch.told)),
            batch.latents,
            batch.noise,
            batch.t,
            self.schedule,
            weighting="none" if plain else self.settings.weighting,
            gamma=self.settings.min_snr_gamma,
            input_noise=batch.seen_noise,
            reduction="none",
        )

    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """The plain loss on held-out pictures, by quartile of the noise level."""
        numbers: dict[str, float] = {}
        for split in SPLITS[:2]:
            pictures = self.pictures.held_out(split, 512)
            if pictures is None:
                continue
            rng = key(0, 0, 6)
            draws = [self._shown(pictures, i, 64, rng) for i in range(0, 512, 64)]
            latents = torch.cat([self._encoded(draw) for draw in draws])
            rows = rng.standard_normal(latents.shape, dtype=np.float32)
            noise = torch.from_numpy(rows).to(self.device)
            t = stratified_timesteps(0, len(latents), self.schedule.steps, 0).to(self.device)
            errors = []
            for i, draw in enumerate(draws):
                rows = slice(64 * i, 64 * i + len(draw.places))
                told = self._with_scale(self.task.told(draw).to(self.device), 1.0)
                part = Batch(latents[rows], noise[rows], t[rows], told, noise[rows], t[rows])
                errors.append(self.error(module, part, plain=True))
            error = torch.cat(errors)
            numbers[f"loss_{split}"] = round(float(error.mean()), 5)
            for q in range(4):
                part = error[(t * 4 // self.schedule.steps) == q]
                numbers[f"loss_{split}_q{q + 1}"] = round(float(part.mean()), 4)
        return numbers

    def _shown(
        self, pictures: Pictures, first: int, count: int, rng: np.random.Generator | None = None
    ) -> Draw:
        """Held-out pictures from ``first`` on, none dropped."""
        rngs = [rng or key(0, first + i, 6) for i in range(count)]
        extra = [key(0, first + i, 7) for i in range(count)]
        places, flips, none = np.arange(first, first + count), *np.zeros((2, count), bool)
        crop = self.recipe.data.crop
        return Draw(
            pictures, places, flips, rngs, extra, none, crop=crop, plain=rng is None, shown=True
        )

    def _encoded(self, draw: Draw) -> Tensor:
        return self.frozen.encode(draw.pixels)

    def _with_scale(self, told: Told, scale: float) -> Told:
        """For students that are told their guidance scale; others are left as they are."""
        width = self.settings.unet.guidance_embedding_size
        if not width:
            return told
        scales = torch.full((len(told.tokens),), scale, device=told.tokens.device)
        return told._replace(guidance=guidance.guidance_embedding(scales, width))

    def sample(self, module: nn.Module, path: Path) -> None:
        """24 held-out pictures' conditions, guidance 3, the same seeds every time: DPM++ 2M in 25
        steps, or LCM in 4 where consistency is learned. Tasks that see a picture show it above."""
        pictures = self.pictures.held_out("combo", 24)
        if pictures is None:
            return
        draw = self._shown(pictures, 0, 24)
        told = self._with_scale(self.task.told(draw).to(self.device), 3.0)
        few = self.recipe.distill is not None and self.recipe.distill.kind == "consistency"
        result = self._denoised(module, told, few=few)
        assert self.frozen.vae is not None
        made = self.frozen.vae.decode(result).cpu()
        if self.settings.task == "text":
            rows = [made[:12], made[12:]]
        else:
            rows = [part for i in (0, 12) for part in (draw.pixels[i : i + 12], made[i : i + 12])]
        save_grid(rows, path)

    def _denoised(self, module: nn.Module, told: Told, *, few: bool) -> Tensor:
        spec, count = self.settings.unet, len(told.tokens)
        shape = (spec.out_channels, spec.sample_size, spec.sample_size)
        x = torch.stack([initial_noise(i, shape) for i in range(count)]).to(self.device)
        name, steps = ("lcm", 4) if few else ("dpm++2m", 25)
        plan = grid.timesteps(self.schedule, steps, sampler=name)
        draws = [key(0, i, 9) for i in range(count)]

        def noise(*_: Any) -> Tensor:
            rows = [r.standard_normal(shape, dtype=np.float32) for r in draws]
            return torch.from_numpy(np.stack(rows)).to(self.device)

        solver = solvers.solve(name, x, self.schedule, plan, **({"noise": noise} if few else {}))
        twin = None if spec.guidance_embedding_size else self.task.twin(told)
        answer = None
        while True:
            try:
                ask = next(solver) if answer is None else solver.send(answer)
            except StopIteration as stop:
                return stop.value
            t = torch.full((count,), float(ask.timestep), device=self.device)
            answer = predict(module, ask.x, t, told)
            if twin is not None:
                answer = guidance.cfg(predict(module, ask.x, t, twin), answer, 3.0)

    def export(self, module: nn.Module, folder: Path) -> None:
        """Writes ``unet.safetensors``, ``unet.json``, ``schedule.json``; for unCLIP
        ``normaliser.safetensors`` (``mean`` and ``std``, ``(1, D)``) too."""
        state = {k: v.contiguous() for k, v in module.state_dict().items()}
        save_file(state, folder / "unet.safetensors")
        (folder / "unet.json").write_text(self.settings.unet.model_dump_json(indent=1))
        (folder / "schedule.json").write_text(self.spec.model_dump_json(indent=1))
        if isinstance(self.task, UnCLIP):
            spread = {"mean": self.task.mean.cpu(), "std": self.task.std.cpu()}
            save_file(spread, folder / "normaliser.safetensors")
