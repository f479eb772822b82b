"""Training the judge on real renders of all combinations.

    python -m safelight.evaluate.judge_training -o runs/judge [--images 96000] [--minutes 10]

Run the same command again to continue. Every picture is a render of still life's split "all",
from a series that nothing else reads, mirrored or not and lightly worn (colour, blur, lost
resolution, fine and blotchy noise), so that the judge does not stumble over what an autoencoder
leaves out. It never sees an autoencoder's or a generator's pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from safelight.data.attributes import attribute_classes, mirrored_classes
from safelight.data.renders import open_renders, scenes_of
from safelight.data.stilllife import Arrangement, Scene, Split
from safelight.data.stilllife.layout import lay_out, support
from safelight.evaluate.judge import Judge, JudgeNet, JudgeSpec, resized
from safelight.evaluate.towers import autoencode, batched
from safelight.parts import load_vae
from safelight.store.weights import save_safetensors, sha256

SERIES = 5
"""Series of split "all": of the judge alone."""
PICTURES = 49152
HELD_OUT: dict[Split, tuple[int, int]] = {"val": (2, 4096), "combo": (3, 4096), "pair": (4, 2048)}
"""Series and number of pictures of the validation sets."""

BATCH, LR, WARMUP, WEIGHT_DECAY = 64, 2e-3, 4000, 0.02


def random(seed: int, index: int, stream: int) -> torch.Generator:
    """Random numbers of one batch of the run, whenever it is made."""
    return torch.Generator().manual_seed((seed * 1009 + stream) * 1_000_003 + index)


def worn(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures ``(N, 3, H, W)`` in [-1, 1], each worn in its own random way, or not at all."""
    n, _, height, width = pixels.shape

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=rng)

    def sometimes(share: float) -> Tensor:
        return (torch.rand(n, 1, 1, 1, generator=rng) < share).float()

    x = pixels * uniform(0.94, 1.06, 3) + uniform(-0.05, 0.05, 3)
    # Blur of up to one pixel, by going part of the way to the picture blurred by one pixel.
    taps = torch.exp(-0.5 * torch.arange(-2.0, 3.0) ** 2)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
    blurred = F.conv2d(padded, kernel.expand(3, 1, 5, 5).contiguous(), groups=3)
    x = x + sometimes(0.4) * uniform(0.0, 1.0) * (blurred - x)
    # Lost resolution: drawn at down to 60 % and brought back.
    side = int(height * float(torch.empty(1).uniform_(0.6, 0.95, generator=rng)))
    small = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
    again = F.interpolate(small, size=(height, width), mode="bilinear")
    x = x + sometimes(0.25) * (again - x)
    blotches = F.interpolate(torch.randn(n, 3, 16, 16, generator=rng), size=(height, width))
    x = x + sometimes(0.3) * uniform(0.0, 0.06) * blotches
    x = x + sometimes(0.4) * uniform(0.0, 0.08) * torch.randn(x.shape, generator=rng)
    return x.clamp(-1.0, 1.0)


def middles(scenes: Sequence[Scene]) -> np.ndarray:
    """Where each thing has its middle: float32 ``(N, 2, 2)``, x right and y down in 0..1.

    The second row of a lone thing is NaN.
    """
    out = np.full((len(scenes), 2, 2), np.nan, np.float32)
    right, left = (1.0, 0.0, 0.0), (-1.0, 0.0, 0.0)
    for i, scene in enumerate(scenes):
        lay = lay_out(scene)
        up = (0.0, math.cos(lay.pitch), -math.sin(lay.pitch))
        down = (0.0, -up[1], -up[2])
        for slot, body in enumerate(lay.bodies):
            u = body.centre[0] + (support(body, right) - support(body, left)) / 2
            v = body.centre[1] * up[1] + body.centre[2] * up[2]
            v += (support(body, up) - support(body, down)) / 2
            out[i, slot] = (u - lay.u) / lay.view + 0.5, 0.5 - (v - lay.v) / lay.view
    return out


def mirrored_middles(places: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The middles in the mirrored pictures."""
    out = places * np.array([-1, 1], np.float32) + np.array([1, 0], np.float32)
    beside = classes[:, 0] == Arrangement.LEFT_RIGHT
    out[beside] = out[beside][:, ::-1]
    return out


def place_loss(where: Tensor, places: Tensor, grid: int) -> Tensor:
    """Cross-entropy of the cells against a blob of one cell's width around each middle."""
    steps = (torch.arange(grid) + 0.5) / grid
    near = -0.5 * ((places[..., None] - steps) * grid / 0.7) ** 2  # (N, 2, xy, grid)
    blob = (near[:, :, 1, :, None] + near[:, :, 0, None, :]).flatten(2).softmax(-1)
    there = ~places.isnan().any(-1)
    return -(blob[there] * where[there]).sum(-1).mean()


class Training:
    """A run: where it is, and how to go on."""

    def __init__(self, folder: Path, renders: Path, images: int, seed: int = 0) -> None:
        self.folder, self.images, self.seed = folder, images, seed
        self.cache = renders
        self.pictures = open_renders(
            renders, seed=SERIES, split="all", size=64, count=PICTURES, workers=1
        )
        scenes = scenes_of(SERIES, PICTURES, "all")
        classes, places = attribute_classes(scenes), middles(scenes)
        self.targets = {False: classes, True: mirrored_classes(classes)}
        self.places = {False: places, True: mirrored_middles(places, classes)}
        torch.manual_seed(seed)
        self.net = JudgeNet(JudgeSpec())
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.seen, self.wall, self.cpu = 0, 0.0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "checkpoint.pt"
        if file.exists():
            state = torch.load(file, weights_only=True)
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.seen, self.wall, self.cpu = state["seen"], state["wall"], state["cpu"]

    def batch(self, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures ``start`` to ``start + BATCH`` of the run, their classes and places."""
        epoch, place = divmod(start, PICTURES)
        order = torch.randperm(PICTURES, generator=random(self.seed, epoch, 1)).numpy()
        rows = np.sort(order[place : place + BATCH])
        flips = (torch.rand(BATCH, generator=random(self.seed, start, 2)) < 0.5).numpy()
        pictures = np.array(self.pictures[rows])
        pictures[flips] = pictures[flips][:, :, ::-1]
        classes = np.where(flips[:, None], self.targets[True][rows], self.targets[False][rows])
        places = np.where(flips[:, None, None], self.places[True][rows], self.places[False][rows])
        pixels = worn(resized(pictures, 64), random(self.seed, start, 3))
        pixels = pixels.to(memory_format=torch.channels_last)
        return pixels, torch.from_numpy(classes), torch.from_numpy(places)

    def rate(self) -> float:
        """Learning rate: linear warm-up, then half a cosine to zero."""
        if self.seen < WARMUP:
            return LR * (self.seen + BATCH) / WARMUP
        return LR * 0.5 * (1 + math.cos(math.pi * (self.seen - WARMUP) / (self.images - WARMUP)))

    def step(self) -> tuple[float, float]:
        """One step; the loss and the share of pictures with everything right."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        pixels, targets, places = self.batch(self.seen)
        logits, where = self.net.train()(pixels)
        loss = torch.stack([F.cross_entropy(k, targets[:, i]) for i, k in enumerate(logits)]).sum()
        loss = loss + place_loss(where, places, self.net.spec.grid)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seen += BATCH
        said = torch.stack([k.argmax(1) for k in logits], dim=1)
        return loss.item(), float((said == targets).all(1).float().mean())

    def go(self, minutes: float) -> None:
        """Train to the end, or for ``minutes`` of wall time."""
        wall, cpu, stop = time.monotonic(), time.process_time(), time.monotonic() + 60 * minutes
        losses: list[tuple[float, float]] = []
        while self.seen < self.images and time.monotonic() < stop:
            losses.append(self.step())
            if self.seen % (BATCH * 50) == 0:
                loss, right = np.mean(losses[-50:], axis=0)
                took = time.monotonic() - wall
                print(f"{self.seen} {took:.0f}s loss {loss:.3f} right {right:.3f}", flush=True)
            if self.seen % (BATCH * 150) == 0 or self.seen >= self.images:
                self.wall, wall = self.wall + time.monotonic() - wall, time.monotonic()
                self.cpu, cpu = self.cpu + time.process_time() - cpu, time.process_time()
                self.save()
            if self.seen % (BATCH * 450) == 0:
                print(self.seen, self.measure(512), flush=True)

    def save(self) -> None:
        """Checkpoint, and the judge as it is now."""
        part = self.folder / "checkpoint.part"
        torch.save(
            {
                "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "seen": self.seen,
                "wall": self.wall,
                "cpu": self.cpu,
            },
            part,
        )
        part.replace(self.folder / "checkpoint.pt")
        export(self.net, self.folder / "judge.safetensors")

    def measure(self, count: int | None = None) -> dict[str, float]:
        """All attributes right on each validation set, of the judge as it would ship."""
        judge = Judge.load(self.folder / "judge.safetensors")
        return {split: measure(judge, self.cache, split, count) for split in HELD_OUT}


def measure(
    judge: Judge,
    cache: Path,
    split: Split,
    count: int | None = None,
    *,
    through: Callable[[np.ndarray], np.ndarray] | None = None,
) -> float:
    """Share of held-out real renders on which the judge has every attribute right.

    Args:
        through: what the renders go through first: an autoencoder's reconstruction.
    """
    series, total = HELD_OUT[split]
    count = count or total
    pictures = open_renders(cache, seed=series, split=split, size=64, count=total, workers=1)
    truth = attribute_classes(scenes_of(series, count, split))
    seen = (through(p) if through else p for p in batched(pictures[:count]))
    return float((judge.classes(seen) == truth).all(1).mean())


def export(net: JudgeNet, file: Path) -> None:
    """Write the judge in float16, and its spec beside it."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_safetensors(file, state)
    file.with_suffix(".json").write_text(net.spec.model_dump_json(indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser(prog="python -m safelight.evaluate.judge_training")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--renders", type=Path, default=Path("runs/renders"))
    parser.add_argument("--images", type=int, default=96_000)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help="only measure the saved judge")
    parser.add_argument("--vae", type=Path, help="measure on this autoencoder's reconstructions")
    parser.add_argument("--count", type=int, help="measure on so many of each set; default: all")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    file = options.output / "judge.safetensors"
    if options.measure:
        judge = Judge.load(file)
        through = None if options.vae is None else autoencode(load_vae(options.vae))
        numbers = {
            split: round(measure(judge, options.renders, split, options.count, through=through), 4)
            for split in HELD_OUT
        }
        print(json.dumps({"sha256": sha256(file), **numbers}))
        return
    training = Training(options.output, options.renders, options.images // BATCH * BATCH)
    training.go(options.minutes)
    if training.seen >= training.images:
        record = {
            "pictures_seen": training.seen,
            "wall_seconds": round(training.wall, 1),
            "cpu_seconds": round(training.cpu, 1),
            "sha256": sha256(file),
            "all_right": training.measure(),
        }
        (options.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(record))


if __name__ == "__main__":
    main()
