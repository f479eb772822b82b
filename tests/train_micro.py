"""A regression that trains in microseconds a step, for tests of the loop and its processes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safelight.train.loop import Run
from safelight.train.pictures import key
from safelight.train.recipe import Recipe


class Line:
    """Fits y = 2x + noise with two layers; a sample's noise is keyed by its index."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def data_digest(self) -> str:
        return "line"

    def data_report(self) -> dict[str, Any]:
        return {}

    def batch(self, start: int, count: int) -> Any:
        rows = [key(0, start + i, 1).standard_normal(4, dtype=np.float32) for i in range(count)]
        table = torch.from_numpy(np.stack(rows))
        return table[:, :3], 2 * table[:, :1] + 0.1 * table[:, 3:]

    def loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        x, y = batch
        return (module(x) - y).square().mean(), {}

    def validate(self, module: nn.Module) -> Mapping[str, float]:
        return {"norm": float(module[0].weight.norm())}  # type: ignore[index]

    def sample(self, module: nn.Module, path: Path) -> None:
        path.touch()

    def export(self, module: nn.Module, folder: Path) -> None:
        torch.save(module.state_dict(), folder / "weights.pt")


def line_recipe(folder: Path, **optim: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "line",
            "output": folder,
            "images": 320,
            "save_every": 48,
            "sample_every": 160,
            "optim": {"batch": 16, "lr": 0.05, "decay": 0.5, **optim},
            "ema": {"decay": 0.9},
        }
    )


def train_slowly(folder: str) -> None:
    """A run with pauses, for someone to kill."""
    Run(line_recipe(Path(folder)), Line(), progress=lambda *_: time.sleep(0.02)).go()


def main() -> None:
    """Under torchrun: the losses of a run, written by the first process."""
    folder = Path(sys.argv[1])
    losses: list[float] = []
    recipe = line_recipe(folder, batch=8, processes=2)
    run = Run(recipe, Line(), progress=lambda seen, total, n: losses.append(n["loss"]))
    run.go()
    again = Run(recipe, Line())
    if run.accelerator.is_main_process:
        said = {"losses": losses, "module": run.plain.state_dict(), "again": again.seen}
        torch.save(said, folder / "said.pt")


if __name__ == "__main__":
    main()
