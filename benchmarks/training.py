"""Training the tiny UNet: pictures a second, against a loop of diffusers and accelerate.

    python -m benchmarks.training

The same network from the same weights, the same cached latents, captions, batch and averaging of
weights on both sides. The peer gets what its example script leaves out: cached latents,
channels-last memory and the fused AdamW; in float32 and in bfloat16, and the faster counts. Ours is
timed as the recipe is shipped, and again with one thing after the other taken away.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState

from benchmarks import measure, tiny_model
from safelight.model import Model
from safelight.shipped import FAMILY
from safelight.train import loop
from safelight.train.latent import LatentDiffusionObjective
from safelight.train.pictures import key
from safelight.train.recipe import Recipe, read_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny" / "v1-128.toml"
PICTURES, STEPS, TARGET = 512, 10, 1.3


def main() -> None:
    parser = measure.options(__doc__ or "", rounds=5)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each side a round")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = measure.Report("training", "Training the tiny UNet at 128x128")
    report.clean = measure.quiet(force=options.force)
    clock = measure.clock(options, report)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = Model.load("tiny-v", device="cpu")
        tiny_model.export(model, folder / "exported")
        recipe = _recipe(folder)
        batch = recipe.optim.batch
        ways: dict[str, Callable[[], None]] = {
            "safelight": _ours(recipe),
            "not compiled": _ours(recipe, compile=False),
            "nor hastened": _ours(recipe, compile=False, hastened=False),
            "nor in bfloat16": _ours(recipe, compile=False, hastened=False, precision="float32"),
            "diffusers": _theirs(recipe, folder / "exported", "no"),
            "diffusers, bfloat16": _theirs(recipe, folder / "exported", "bf16"),
        }
        sides = {name: _steps(way, options.steps) for name, way in ways.items()}
        times = measure.in_turns(sides, rounds=options.rounds, clock=clock)
    peers = [name for name in times if name.startswith("diffusers")]
    for name in sides:
        if name in peers:
            continue
        pair = {"safelight": times[name], **{peer: times[peer] for peer in peers}}
        title = "as shipped: compiled, bfloat16, norms and attention of our own"
        title = title if name == "safelight" else name
        target = TARGET if name == "safelight" else None
        report.rows.append(measure.compare(title, pair, target=target))
    pictures = options.steps * batch
    report.notes.append(f"A round is {options.steps} steps of {batch} pictures. Pictures a second:")
    for name, seconds in times.items():
        middle = float(np.median(seconds))
        report.notes.append(f"{name} {pictures / middle:.0f};")
    if options.no_write:
        print(report.markdown())
    else:
        report.write()


def _recipe(folder: Path, **changes: Any) -> Recipe:
    """The shipped recipe on few pictures, from the shipped weights."""
    recipe = read_recipe(RECIPE, output=folder / "run", start=FAMILY / "tiny-v", **changes)
    data = recipe.data.replace(count=PICTURES, cache=folder / "renders")
    shared = FAMILY / "shared"
    assert recipe.diffusion is not None
    diffusion = recipe.diffusion.replace(clip=shared, vae=shared)
    return recipe.replace(data=data, diffusion=diffusion)


def _ours(recipe: Recipe, *, hastened: bool = True, **changes: Any) -> Callable[[], None]:
    """One step of our loop."""
    recipe = recipe.replace(**changes)
    recipe = recipe.replace(
        output=recipe.output / f"{recipe.compile}-{hastened}-{recipe.precision}"
    )
    hasten = loop.hasten
    AcceleratorState._reset_state()  # which holds the precision, one for a process
    try:
        if not hastened:
            loop.hasten = lambda *_, **__: None
        objective: Any = LatentDiffusionObjective(recipe)
        run = loop.Run(recipe, objective)
    finally:
        loop.hasten = hasten
    return lambda: float(run._step()[0]) and None  # type: ignore[func-returns-value]


def _theirs(recipe: Recipe, folder: Path, precision: str) -> Callable[[], None]:
    """One step as diffusers' text-to-image example takes it, latents cached."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import EMAModel
    from transformers import CLIPTextModel

    ours = LatentDiffusionObjective(recipe)
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())
    unet: Any = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    unet = unet.to(memory_format=torch.channels_last).train()
    text: Any = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").requires_grad_(
        False
    )
    scheduler: Any = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    average = EMAModel(unet.parameters(), decay=recipe.ema.decay)
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=1e-6,
        betas=recipe.optim.betas,
        weight_decay=recipe.optim.weight_decay,
        fused=True,
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    assert ours.latents is not None
    assert ours.frozen.tokenizer is not None
    cached = np.array(ours.latents[0], np.float32)
    latents, places = torch.from_numpy(cached), np.arange(PICTURES)
    captions = ours.pictures.captions(
        places, np.zeros(PICTURES, bool), [key(0, k, 3) for k in range(PICTURES)]
    )
    ids = torch.tensor(ours.frozen.tokenizer.tokens(captions))
    draws = torch.Generator().manual_seed(0)

    def step() -> None:
        rows = torch.randint(len(latents), (recipe.optim.batch,), generator=draws)
        clean = latents[rows].contiguous(memory_format=torch.channels_last)
        noise = torch.randn(clean.shape, generator=draws)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(rows),), generator=draws)
        noisy = scheduler.add_noise(clean, noise, t)
        with torch.no_grad():
            states = text(ids[rows])[0]
        target = scheduler.get_velocity(clean, noise, t)
        answer = unet(noisy, t, states, return_dict=False)[0]
        accelerator.backward(F.mse_loss(answer.float(), target.float()))
        accelerator.clip_grad_norm_(unet.parameters(), recipe.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())

    return step


def _steps(way: Callable[[], None], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            way()

    return run


if __name__ == "__main__":
    main()
