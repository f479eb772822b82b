"""``safelight plan``, and the prediction behind it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from micro_models import MICRO
from safelight import presets
from safelight.cli.main import app
from safelight.nets.unet import UNet
from safelight.runtime import estimate
from safelight.runtime.plan import PLAIN, Plan


def run(*words: str) -> str:
    done = CliRunner().invoke(app, ["plan", *words])
    assert done.exit_code == 0, done.output
    return done.output


def test_bytes_alive_are_those_of_a_sum_done_by_hand() -> None:
    """A chain of three layers keeps two of its results alive at a time; a residual one three."""

    class Chain(nn.Module):
        def __init__(self, residual: bool) -> None:
            super().__init__()
            self.residual = residual
            self.layers = nn.ModuleList([nn.Linear(10, 10) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 1
            h = x
            for layer in self.layers:
                h = layer(h)
                if self.residual:
                    h = h.relu()
            return x + h if self.residual else h

    with torch.device("meta"):
        x, size = torch.empty(25, 10), 4 * 25 * 10
        for residual, expected in ((False, 3), (True, 3)):
            net = Chain(residual)
            # Without the residual nothing needs the first sum, but a name holds it.
            assert estimate._alive(lambda net=net: net(x)) == expected * size


def test_attention_has_no_scores() -> None:
    """4096 tokens: scores of one head alone would be 64 MiB a row."""
    assert estimate.unet_activations(presets.SD_V1.unet, 64, 64) < 200 * 2**20
    few, many = (estimate.unet_activations(MICRO.unet, side, side) for side in (8, 32))
    assert 14 < many / few < 18


def test_weights_are_counted() -> None:
    with torch.device("meta"):
        unet = UNet(presets.SD_V1.unet)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    held, copied = estimate.weights(presets.SD_V1, PLAIN)
    assert copied == 0
    assert 4 * 859_520_964 < held < 4 * 1_066_000_000
    assert 0.6 * held < estimate.weights(presets.SD_V1, Plan())[1] < 1.1 * held


def test_more_pictures_and_larger_ones_take_more() -> None:
    def peak(**more: int) -> int:
        asked = {"width": 256, "height": 256, "count": 1, "together": 1} | more
        return estimate.estimate(presets.TINY, plan=PLAIN, **asked).peak

    alone = peak()
    assert peak(count=8) > alone
    assert peak(count=8, together=8) > peak(count=8)
    assert peak(width=512) > alone
    assert peak(width=512, height=128) == pytest.approx(alone, rel=0.02)


def test_the_command() -> None:
    told = json.loads(run("-m", "tiny", "--size", "256", "--count", "4", "--json"))
    assert (told["model"], told["width"], told["count"]) == ("tiny", 256, 4)
    assert set(told["plans"]) == {"fast", "plain"}
    for parts in told["plans"].values():
        turns = max(parts["unet"], parts["decoder"])
        rest = sum(parts[p] for p in ("base", "weights", "layouts", "pictures"))
        assert parts["peak"] == turns + rest
    text = run("-m", "tiny")
    assert "1 of 128x128" in text
    assert "Plan: " in text or "no plan fits" in text


def test_what_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from safelight.cli import plan

    monkeypatch.setattr(plan, "_free", lambda: 2**20)
    assert "no plan fits" in run("-m", "tiny")
    parts = json.loads(run("-m", "tiny", "--json"))["plans"]
    monkeypatch.setattr(plan, "_free", lambda: parts["plain"]["peak"] + 1)
    if parts["fast"]["peak"] > parts["plain"]["peak"] + 1:
        assert "Plan: plain" in run("-m", "tiny")


@pytest.mark.parametrize("words", [("--size", "100"), ("--size", "axb"), ("-m", "nothing-such")])
def test_bad_input_is_a_clear_error(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, ["plan", "-m", "tiny", *words])
    assert done.exit_code not in (0, 1), done.output
