"""The loop: a run that was interrupted ends where an uninterrupted one does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from safelight.train import checkpoint
from safelight.train.ema import EMA, power_exponent
from safelight.train.loop import Run
from safelight.train.pictures import key
from safelight.train.recipe import EMARecipe, Recipe


class Regression:
    """Fits y = 2x + noise; the noise of a sample is keyed by its index, as in real objectives."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(3, 1)
        self.starts: list[int] = []

    def data_digest(self) -> str:
        return "line"

    def data_report(self) -> dict[str, Any]:
        return {}

    def batch(self, start: int, count: int) -> Any:
        self.starts.append(start)
        rows = [key(0, start + i, 1).standard_normal(4, dtype=np.float32) for i in range(count)]
        table = torch.from_numpy(np.stack(rows))
        return table[:, :3], 2 * table[:, :1] + 0.1 * table[:, 3:]

    def loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        x, y = batch
        return (module(x) - y).square().mean(), {}

    def validate(self, module: nn.Module) -> Mapping[str, float]:
        return {"weight": float(module.weight[0, 0])}

    def sample(self, module: nn.Module, path: Path) -> None:
        path.touch()

    def export(self, module: nn.Module, folder: Path) -> None:
        torch.save(module.state_dict(), folder / "weights.pt")


def recipe(folder: Path, images: int = 640) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "line",
            "output": folder,
            "images": images,
            "save_every": 160,
            "sample_every": 320,
            "optim": {"batch": 16, "lr": 0.2, "decay": 0.5},
            "ema": {"decay": 0.9},
        }
    )


def test_interrupted_run_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    whole = Run(recipe(tmp_path / "whole"), Regression())
    whole.go()

    class Interrupted(Exception):
        pass

    def stop(seen: int, total: int, numbers: Any) -> None:
        if seen >= 400:
            raise Interrupted

    with pytest.raises(Interrupted):
        Run(recipe(tmp_path / "part"), Regression(), progress=stop).go()
    objective = Regression()
    resumed = Run(recipe(tmp_path / "part"), objective)
    assert resumed.seen == 320, "the last checkpoint before the interruption"
    resumed.go()
    assert objective.starts[0] == 320
    for name, value in whole.plain.state_dict().items():
        assert torch.equal(value, resumed.plain.state_dict()[name])
    for name, value in whole.ema.state_dict().items():
        assert torch.equal(value, resumed.ema.state_dict()[name])


def test_it_learns_and_reports(tmp_path: Path) -> None:
    numbers = Run(recipe(tmp_path), Regression()).go()
    assert numbers["weight"] == pytest.approx(2.0, abs=0.15)
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 2
    assert (tmp_path / "samples-00000640.png").exists()


def test_a_diverged_loss_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    class Diverging(Regression):
        def loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
            loss, logged = super().loss(module, batch)
            return (loss * float("nan") if len(self.starts) > 15 else loss), logged

    with pytest.raises(FloatingPointError, match=r"optim\.lr"):
        Run(recipe(tmp_path), Diverging()).go()
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    assert saved["seen"] == 160
    assert all(bool(v.isfinite().all()) for v in saved["module"].values())


def test_ema_follows_its_formula() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema, expected = EMA(module, 0.5), 0.0
    for n in range(1, 20):
        nn.init.constant_(module.weight, float(n))
        ema.update(module)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert float(ema.state_dict()["weight"]) == pytest.approx(expected, rel=1e-6)


def test_a_power_function_average_is_its_sum() -> None:
    width, total = 0.1, 400
    module = nn.Linear(1, 1, bias=False)
    ema = EMA(module, 0.0, width=width)
    gamma = power_exponent(width)
    weights = np.zeros(total)
    for n in range(1, total + 1):
        nn.init.constant_(module.weight, float(n))
        ema.update(module)
        beta = (1 - 1 / n) ** (gamma + 1)
        weights *= beta
        weights[n - 1] += 1 - beta
    times = np.arange(1, total + 1)
    assert float(ema.state_dict()["weight"]) == pytest.approx(float(weights @ times), rel=1e-4)
    # The profile's spread is what was asked for (Karras et al. 2024, section 3.1).
    mean = weights @ times
    spread = np.sqrt(weights @ (times - mean) ** 2) / total
    assert spread == pytest.approx(width, rel=0.02)
    assert power_exponent(0.05) == pytest.approx(16.97, abs=0.01)
    assert power_exponent(0.10) == pytest.approx(6.94, abs=0.01)


def test_a_run_may_keep_a_power_function_average(tmp_path: Path) -> None:
    run = Run(recipe(tmp_path, 64).replace(ema=EMARecipe(kind="power")), Regression())
    run.go()
    again = Run(recipe(tmp_path, 64).replace(ema=EMARecipe(kind="power")), Regression())
    assert again.ema.updates == 4
    assert torch.equal(again.ema.state_dict()["weight"], run.ema.state_dict()["weight"])
