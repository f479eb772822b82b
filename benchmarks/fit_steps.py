"""Which few noise levels a model is best sampled at: ``python -m benchmarks.fit_steps``.

Chen et al. 2024, "On the Trajectory Regularity of ODE-based Diffusion Sampling" (GITS), section 4.
Guided trajectories of many prompts are walked in fine steps; the cost of going from one level to
another in a single Euler step is how far that ends from the fine trajectory; the cheapest way
with so many steps is found by dynamic programming. In VE coordinates, ``x / sqrt(ā)``.

Prints the timesteps, for ``schedule.fitted`` of the member's ``model.json``.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

import safelight
from safelight.conditioning import encode_prompts
from safelight.diffusion import grid, guidance
from safelight.diffusion.noise import initial_noise
from safelight.diffusion.prediction import to_eps
from safelight.diffusion.schedule import rates
from safelight.evaluate import prompts
from safelight.model import Model
from safelight.text import weighting


def cheapest(costs: np.ndarray, steps: int) -> list[int]:
    """The places of a way from the first level to the last.

    Args:
        costs: ``(L, L)``; ``costs[i, j]`` of going from level i to level j > i in one step.
        steps: how many it takes.

    Returns:
        ``steps + 1`` places, rising, from 0 to L - 1.
    """
    levels = len(costs)
    upper = np.where(np.triu(np.ones_like(costs), 1) > 0, costs, np.inf)
    best, ways = upper[:, levels - 1], []  # of reaching the end from each level, in one step
    for _ in range(steps - 1):
        total = upper + best[None, :]
        ways.append(total.argmin(1))
        best = total.min(1)
    place, found = 0, [0]
    for way in reversed(ways):
        place = int(way[place])
        found.append(place)
    return [*found, levels - 1]


@torch.inference_mode()
def walked(model: Model, count: int, fine: int) -> tuple[list[float], np.ndarray, list[float]]:
    """Fine levels, the costs of every step between two of them, and the levels' timesteps."""
    plan = grid.timesteps(model.schedule, fine, "trailing", sampler="ddim", next_step=True)
    sigmas, scale = [*plan.sigmas, 0.0], model.spec.guidance_scale
    chosen, kind = prompts.load("paired", count), model.schedule.prediction_type
    side = model.spec.unet.sample_size
    texts = [weighting.parse(text, "none").texts(1)[0] for text in ("", *(p.text for p in chosen))]
    tokens = torch.stack([each.tokens for each in encode_prompts(model, texts)])
    nothing, words = tokens[:1].expand_as(tokens[1:]), tokens[1:]
    x = torch.cat([initial_noise(p.seed, (1, 4, side, side)) for p in chosen])
    x = x / rates(sigmas[0])[0]  # VE
    places, slopes = [x], []
    for k, t in enumerate(plan.timesteps):
        seen = x * rates(sigmas[k])[0]
        time = torch.full((2 * count,), t)
        u, c = model.unet(torch.cat([seen, seen]), time, torch.cat([nothing, words])).chunk(2)
        slope: Tensor = to_eps(guidance.cfg(u, c, scale), seen, model.schedule.abar(t), kind)
        slopes.append(slope)
        x = x + (sigmas[k + 1] - sigmas[k]) * slope
        places.append(x)
    costs = np.zeros((len(sigmas), len(sigmas)))
    for i, slope in enumerate(slopes):
        for j in range(i + 1, len(sigmas)):
            one = places[i] + (sigmas[j] - sigmas[i]) * slope
            costs[i, j] = float((one - places[j]).flatten(1).norm(dim=1).mean())
    return sigmas, costs, list(plan.timesteps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-v")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--fine", type=int, default=60, help="levels of the fine trajectory")
    parser.add_argument("--count", type=int, default=128, help="prompts")
    options = parser.parse_args()
    model = safelight.load(options.model, device="cpu").model
    _, costs, timesteps = walked(model, options.count, options.fine)
    print([timesteps[place] for place in cheapest(costs, options.steps)[:-1]])


if __name__ == "__main__":
    main()
