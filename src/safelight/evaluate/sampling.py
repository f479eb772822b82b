"""Pictures straight from networks: many at once, one solver for all.

For following a training run from its folder. What ships is measured through
:mod:`safelight.generate` instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from safelight.diffusion import grid, guidance, solvers
from safelight.diffusion.noise import initial_noise
from safelight.diffusion.schedule import Schedule
from safelight.evaluate.score import Generate
from safelight.evaluate.towers import context
from safelight.nets.clip import TextTower
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE, to_uint8
from safelight.spec import ScheduleSpec
from safelight.text.tokenizer import Tokenizer


def sampler(
    unet: UNet,
    schedule: ScheduleSpec,
    text: TextTower,
    tokenizer: Tokenizer,
    vae: VAE,
    *,
    guidance_scale: float = 3.0,
    steps: int = 25,
    name: str = "dpm++2m",
) -> Generate:
    """A function that samples prompts with classifier-free guidance."""
    plan = Schedule.from_spec(schedule)

    @torch.inference_mode()
    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        nothing = context(text, tokenizer, [""])
        words = context(text, tokenizer, list(prompts))
        both = torch.cat([nothing.expand_as(words), words])
        shape = (unet.spec.out_channels, unet.spec.sample_size, unet.spec.sample_size)
        x = torch.stack([initial_noise(seed, shape) for seed in seeds])

        def predict(x: Tensor, timestep: float) -> Tensor:
            t = torch.full((2 * len(x),), timestep)
            # The network's convolutions are faster with channels last on a CPU.
            twice = torch.cat([x, x]).to(memory_format=torch.channels_last)
            uncond, cond = unet(twice, t, both).chunk(2)
            return guidance.cfg(uncond, cond, guidance_scale)

        solver = solvers.solve(name, x, plan, grid.timesteps(plan, steps, sampler=name))
        answer: Tensor | None = None
        while True:
            try:
                ask = next(solver) if answer is None else solver.send(answer)
            except StopIteration as stop:
                return to_uint8(vae.decode(stop.value)).numpy()
            answer = predict(ask.x, float(ask.timestep))

    return generate
