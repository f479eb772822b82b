"""Training a UNet in latent space (Rombach et al. 2022, equation 3).

Autoencoder and text tower are frozen. Latents are computed once, of every render and of its
mirror image: the autoencoder pads asymmetrically, so latents themselves must never be flipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from safelight.data import stilllife
from safelight.diffusion import grid, guidance, losses, solvers
from safelight.diffusion.noise import initial_noise
from safelight.diffusion.schedule import Schedule
from safelight.errors import InvalidRequest
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.parts import load_text, load_unet, load_vae
from safelight.spec import ScheduleSpec
from safelight.train.pictures import SPLITS, Stream, key, save_grid, to_pixels, validation
from safelight.train.recipe import Recipe

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
    """See the file's head; ``recipe.diffusion`` names the frozen parts."""

    def __init__(self, recipe: Recipe) -> None:
        if recipe.diffusion is None:
            raise InvalidRequest("diffusion", "the recipe has no such section.")
        self.recipe, self.settings = recipe, recipe.diffusion
        self.text, self.tokenizer = load_text(self.settings.clip)
        self.vae = load_vae(self.settings.vae)
        self.spec = ScheduleSpec(prediction_type=self.settings.prediction_type)
        self.schedule = Schedule.from_spec(self.spec)
        torch.manual_seed(recipe.seed)
        self.module: UNet = UNet(self.settings.unet)
        if recipe.start is not None:
            self.module.load_state_dict(load_unet(recipe.start)[0].state_dict())
        else:
            # The last convolution starts at zero: the first prediction is the mean, not noise.
            nn.init.zeros_(self.module.conv_out.weight)
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.stream = Stream(recipe.data, recipe.seed)
        digest = hashlib.blake2b((self.settings.vae / "vae.safetensors").read_bytes())
        data = recipe.data
        name = f"latents-{data.split}-{data.seed}-{data.size}px-{data.count}"
        half = recipe.precision == "bfloat16"
        path = data.cache / f"{name}-{digest.hexdigest()[:12]}{'-half' if half else ''}.npy"
        vae = self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.latents = encode_all(vae, self.stream.renders, path, half=half)

    @torch.no_grad()
    def context(self, captions: list[str]) -> Tensor:
        """Unpooled text states ``(N, L, width)``."""
        return self.text(torch.tensor(self.tokenizer.tokens(captions))).states

    def batch(self, start: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        places, flips = self.stream.places(start, count)
        order = np.lexsort((places, flips))
        latents = np.empty((count, *self.latents.shape[2:]), dtype=np.float32)
        for i in order:
            latents[i] = self.latents[int(flips[i]), places[i]]
        seed, captions, noise = self.recipe.seed, [], []
        for i, scene in enumerate(self.stream.seen_scenes(places, flips)):
            rng = key(seed, start + i, 3)
            noise.append(rng.standard_normal(latents.shape[1:], dtype=np.float32))
            dropped = rng.random() < self.settings.drop_caption
            captions.append("" if dropped else stilllife.caption(scene, rng))
        t = stratified_timesteps(
            start, count, self.schedule.steps, seed, self.settings.timestep_power
        )
        return (
            torch.from_numpy(latents),
            torch.from_numpy(np.stack(noise)),
            t,
            self.context(captions),
        )

    def loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        latents, noise, t, context = batch
        error = losses.diffusion_loss(
            lambda x, t: module(x.to(memory_format=torch.channels_last), t, context),
            latents,
            noise,
            t,
            self.schedule,
            weighting=self.settings.weighting,
            gamma=self.settings.min_snr_gamma,
            reduction="none",
        )
        high = t >= 3 * self.schedule.steps // 4
        return error.mean().float(), {"high_noise": float(error.detach()[high].mean())}

    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """The plain loss on held-out pictures, by quartile of the noise level."""
        numbers = {}
        for split in SPLITS[:2]:
            pixels, scenes = validation(self.recipe.data, split, 512)
            latents = torch.cat([self.vae.encode(p).mean for p in pixels.split(64)])
            latents = latents * self.vae.spec.scaling_factor
            rng = key(0, 0, 6)
            noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
            t = stratified_timesteps(0, len(latents), self.schedule.steps, 0)
            context = self.context([stilllife.caption(s, rng) for s in scenes])
            error = torch.cat(
                [
                    losses.diffusion_loss(
                        lambda x, t, c=c: module(x, t, c),
                        z,
                        n,
                        s,
                        self.schedule,
                        reduction="none",
                    )
                    for z, n, s, c in zip(
                        latents.split(64),
                        noise.split(64),
                        t.split(64),
                        context.split(64),
                        strict=True,
                    )
                ]
            )
            numbers[f"loss_{split}"] = round(float(error.mean()), 5)
            for q in range(4):
                part = error[(t * 4 // self.schedule.steps) == q]
                numbers[f"loss_{split}_q{q + 1}"] = round(float(part.mean()), 4)
        return numbers

    def sample(self, module: nn.Module, path: Path) -> None:
        """24 held-out prompts, DPM++ 2M, 25 steps, guidance 3; the same seeds every time."""
        _, scenes = validation(self.recipe.data, "combo", 24)
        prompts = [stilllife.plain_caption(s) for s in scenes]
        both = self.context([""] * len(prompts) + prompts)
        side = self.settings.unet.sample_size
        x = torch.stack([initial_noise(i, (4, side, side)) for i in range(len(prompts))])
        steps = grid.timesteps(self.schedule, 25, sampler="dpm++2m")
        solver = solvers.solve("dpm++2m", x, self.schedule, steps)
        answer, result = None, None
        while result is None:
            try:
                ask = next(solver) if answer is None else solver.send(answer)
            except StopIteration as stop:
                result = stop.value
                break
            t = torch.full((len(both),), float(ask.timestep))
            uncond, cond = module(torch.cat([ask.x, ask.x]), t, both).chunk(2)
            answer = guidance.cfg(uncond, cond, 3.0)
        made = self.vae.decode(result)
        save_grid([made[:12], made[12:]], path)

    def export(self, module: nn.Module, folder: Path) -> None:
        """Writes ``unet.safetensors``, ``unet.json`` and ``schedule.json``."""
        state = {k: v.contiguous() for k, v in module.state_dict().items()}
        save_file(state, folder / "unet.safetensors")
        (folder / "unet.json").write_text(self.settings.unet.model_dump_json(indent=1))
        (folder / "schedule.json").write_text(self.spec.model_dump_json(indent=1))
