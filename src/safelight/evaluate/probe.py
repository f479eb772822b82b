"""What a frozen image embedding still knows of a picture, read out by a small MLP.

    python -m safelight.evaluate.probe --clip runs/tiny/clip --renders runs/renders

The probe is trained on training renders alone; "all" is the share of held-out pictures on which
it names arrangement, both shapes and both colours right. Alain and Bengio 2016 (1610.01644) used
linear probes; this one has hidden layers, because relation and order are not linear in anything.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.data.attributes import ATTRIBUTE_CLASSES, attribute_classes
from safelight.data.renders import open_renders, scenes_of
from safelight.data.stilllife import Split
from safelight.evaluate.judge_training import HELD_OUT
from safelight.evaluate.towers import Features, batched, clip_features
from safelight.parts import load_vision

GATES = {"val": 0.92, "combo": 0.85}
"""What CLIP must reach before any UNet trains."""
TRAIN_SERIES, TRAIN_COUNT = 1, 98304
"""The set of training renders that is read from the cache."""


class Probe(nn.Module):
    """Standardised embeddings to logits of every attribute."""

    def __init__(self, width: int, hidden: int = 512) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(hidden, sum(ATTRIBUTE_CLASSES.values())),
        )
        self.mean: Tensor
        self.std: Tensor

    def forward(self, embeddings: Tensor) -> list[Tensor]:
        logits = self.layers((embeddings - self.mean) / self.std)
        return list(logits.split(list(ATTRIBUTE_CLASSES.values()), dim=1))


def train_probe(
    embeddings: np.ndarray,
    classes: np.ndarray,
    *,
    epochs: int = 30,
    batch: int = 256,
    lr: float = 2e-3,
    noise: float = 0.05,
    seed: int = 0,
) -> Probe:
    """Fit a probe.

    Args:
        embeddings: float ``(N, D)``.
        classes: int64 ``(N, 5)``, :func:`~safelight.data.attributes.attribute_classes`.
        noise: standard deviation of the noise on standardised embeddings, against overfitting.
    """
    x, targets = torch.from_numpy(embeddings).float(), torch.from_numpy(classes)
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # initial weights and dropout
        probe = Probe(x.shape[1])
        probe.mean.copy_(x.mean(0))
        probe.std.copy_(x.std(0).clamp(min=1e-6))
        optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=0.05)
        steps = epochs * (len(x) // batch)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            place = step % (len(x) // batch)
            if place == 0:
                order = torch.randperm(len(x), generator=rng)
            rows = order[place * batch : (place + 1) * batch]
            jitter = noise * probe.std * torch.randn(len(rows), x.shape[1], generator=rng)
            logits = probe(x[rows] + jitter)
            loss = torch.stack(
                [F.cross_entropy(k, targets[rows, i]) for i, k in enumerate(logits)]
            ).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return probe.eval()


@torch.inference_mode()
def read_out(probe: Probe, embeddings: np.ndarray) -> np.ndarray:
    """int64 ``(N, 5)`` class numbers that the probe reads from embeddings."""
    logits = probe(torch.from_numpy(embeddings).float())
    return torch.stack([k.argmax(1) for k in logits], dim=1).numpy()


def agreement(said: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Share of pictures right in each attribute, and in all of them."""
    same = said == truth
    parts = {name: float(same[:, i].mean()) for i, name in enumerate(ATTRIBUTE_CLASSES)}
    return {"all": float(same.all(1).mean()), **parts}


def probe_embeddings(
    features: Features, renders: Path, *, count: int = 32768, size: int = 64, epochs: int = 30
) -> Mapping[str, Mapping[str, float]]:
    """Train a probe on ``count`` training renders and report it on val, combo and pair."""

    def embed(series: int, split: Split, total: int, used: int) -> tuple[np.ndarray, np.ndarray]:
        pictures = open_renders(renders, seed=series, split=split, size=size, count=total)[:used]
        embeddings = np.concatenate([features(part) for part in batched(pictures)])
        return embeddings, attribute_classes(scenes_of(series, used, split))

    probe = train_probe(*embed(TRAIN_SERIES, "train", TRAIN_COUNT, count), epochs=epochs)
    result = {}
    for split, (series, total) in HELD_OUT.items():
        embeddings, classes = embed(series, split, total, total)
        result[split] = agreement(read_out(probe, embeddings), classes)
    return result


def main(arguments: list[str] | None = None) -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser(prog="python -m safelight.evaluate.probe")
    parser.add_argument("--clip", type=Path, required=True, help="folder with vision.*")
    parser.add_argument("--renders", type=Path, default=Path("runs/renders"))
    parser.add_argument("--count", type=int, default=32768, help="training renders")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pooled", action="store_true", help="before the projection")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    began = time.monotonic()
    features = clip_features(load_vision(options.clip), projected=not options.pooled)
    result = probe_embeddings(features, options.renders, count=options.count, epochs=options.epochs)
    for split, numbers in result.items():
        gate = GATES.get(split)
        verdict = "" if gate is None else "pass" if numbers["all"] >= gate else "FAIL"
        goal = "" if gate is None else f" (gate {gate})"
        print(
            f"{split}: {json.dumps({k: round(v, 4) for k, v in numbers.items()})}{goal} {verdict}"
        )
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
