"""What de-duplication changes: ``python -m benchmarks.memorisation -o outputs/duplicates``.

480 still lifes, and 12 that stand in the training set 40 times each, half of the copies in another
size and format. The tiny UNet is trained on from its shipped weights, for as many pictures each
time: once on all 960, once without what ``safelight data dedup`` finds. Both are then asked with
the same captions and seeds, and their pictures are compared with the training pictures. Real
pictures that neither saw are the control. Minutes on a free CPU, and not part of the suite.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight.data.clip import load_clip
from safelight.data.duplicates import find_duplicates
from safelight.data.sources import Source, StillLife, open_source, without
from safelight.diffusion.losses import diffusion_loss
from safelight.evaluate import memorisation
from safelight.evaluate.memorisation_report import Findings, markdown, write
from safelight.evaluate.towers import context
from safelight.generate import Generator
from safelight.model import Model

SIZE = 64
ALONE, PLANTED, COPIES = 480, 12, 40


def plant(folder: Path) -> Source:
    """The training set, as files with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = StillLife("train", 4321, ALONE + PLANTED, SIZE)
    for place in range(len(scenes)):
        picture, words = scenes.picture(place), scenes.captions(place)[0]
        large = picture.resize((SIZE * 5 // 4,) * 2, Image.Resampling.BICUBIC)
        for copy in range(COPIES if place < PLANTED else 1):
            stem = folder / f"{place:04d}-{copy:02d}"
            if copy % 2:
                large.save(stem.with_suffix(".jpg"), quality=92)
            else:
                picture.save(stem.with_suffix(".png"))
            stem.with_suffix(".txt").write_text(words)
    return open_source(folder)


def train(source: Source, steps: int, batch: int, lr: float, seed: int = 0) -> Model:
    """The tiny model, its UNet trained on with the pictures of a source."""
    model = Model.load("tiny", device="cpu")
    assert model.text is not None
    assert model.tokenizer is not None
    latents, words = encode(model, source)
    told = context(model.text, model.tokenizer, ["", *words])
    unet = model.unet.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr, weight_decay=0.0)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        rows = torch.from_numpy(rng.integers(0, len(latents), batch))
        dropped = torch.from_numpy(rng.random(batch) < 0.1)
        tokens = told[torch.where(dropped, 0, rows + 1)]
        t = torch.from_numpy(rng.integers(0, model.schedule.steps, batch))
        shape = (batch, *latents.shape[1:])
        noise = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

        def predict(x: Tensor, t: Tensor, tokens: Tensor = tokens) -> Tensor:
            return unet(x, t, tokens)

        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50, (steps - step) / (0.2 * steps))
        loss = diffusion_loss(predict, latents[rows], noise, t, model.schedule)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1} of {steps}: loss {float(loss.detach()):.4f}", flush=True)
    unet.requires_grad_(False).eval()
    return model


@torch.inference_mode()
def encode(model: Model, source: Source, batch: int = 64) -> tuple[Tensor, list[str]]:
    """Scaled latents of all pictures, and their captions."""
    parts, words = [], []
    for start in range(0, len(source), batch):
        places = range(start, min(start + batch, len(source)))
        pictures = [np.asarray(source.picture(i).resize((SIZE, SIZE))) for i in places]
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(model.vae.encode(pixels).mean * model.spec.vae.scaling_factor)
        words += [source.captions(i)[0] for i in places]
    return torch.cat(parts).clone(), words


def main(arguments: Sequence[str] | None = None) -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memorisation")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/duplicates"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--count", type=int, default=200, help="pictures to make with each")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    began = time.monotonic()
    source = plant(options.output / "training")
    found = find_duplicates(source)
    few = without(source, found.drop)
    print(f"{len(source)} pictures, {len(few)} without duplicates")
    clip = load_clip(device="cpu")
    training = memorisation.study(source, clip)
    asked = memorisation.captions_of(source, options.count, seed=0)
    sets = []
    for name, pictures in (("generated", source), ("without duplicates", few), ("control", None)):
        some = Findings(name)
        if pictures is None:
            stream = memorisation.named(StillLife("val", 99, options.count, SIZE))
        else:
            model = train(pictures, options.steps, options.batch, options.lr)
            stream = memorisation.Prompted(
                Generator(model), asked, steps=25, width=SIZE, height=SIZE
            )
        for near, picture in memorisation.nearest(training, clip, stream):
            some.add(near, picture)
        sets.append(some)
        limits = {"pixels": memorisation.PIXELS, "cosine": memorisation.COSINE}
        write(options.output, training, sets, **limits, steps=options.steps, batch=options.batch)
        print(markdown(training, sets, **limits), f"{time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
