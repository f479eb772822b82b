"""Every block of the fused networks gives what the plain one gives, in the run of the whole."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safelight.conditioning import Conditioning
from safelight.model import Model
from safelight.nets.attention import SpatialTransformer
from safelight.nets.layers import Downsample, ResnetBlock, Upsample
from safelight.runtime import PLAIN, Plan, Row, prepare
from safelight.runtime.attention import Transformer
from safelight.runtime.layers import Down, Resnet, Up
from safelight.runtime.plan import everything, lean

PAIRS: dict[type[Any], type[nn.Module]] = {
    Resnet: ResnetBlock,
    Transformer: SpatialTransformer,
    Down: Downsample,
    Up: Upsample,
}
LIMIT = 1e-3
"""Of a tap's standard deviation."""
WHOLE = dataclasses.replace(everything(), shared=False)
PLANS = {"speed": WHOLE, "lean": dataclasses.replace(lean(), shared=False)}


def fused_taps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor]]:
    seen: list[tuple[str, Tensor]] = []
    for kind in PAIRS:
        plain = kind.__call__

        def call(self: Any, *given: Any, plain: Any = plain, **more: Any) -> Tensor:
            out = plain(self, *given, **more)
            seen.append((PAIRS[type(self)].__name__, out.clone()))
            return out

        monkeypatch.setattr(kind, "__call__", call)
    return seen


def plain_taps(net: nn.Module) -> tuple[list[tuple[str, Tensor]], list[Any]]:
    seen: list[tuple[str, Tensor]] = []
    kinds = tuple(PAIRS.values())
    handles = [
        part.register_forward_hook(
            lambda part, _, out: seen.append((type(part).__name__, out.clone()))
        )
        for part in net.modules()
        if isinstance(part, kinds)
    ]
    return seen, handles


def farthest(found: list[tuple[str, Tensor]], expected: list[tuple[str, Tensor]]) -> float:
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert len(found) > 10
    return max(
        float((ours - theirs).abs().max() / theirs.std())
        for (_, ours), (_, theirs) in zip(found, expected, strict=True)
    )


@pytest.fixture(scope="module")
def tiny() -> Model:
    return Model.load("tiny", device="cpu")


def taps_of(model: Model, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 16, 16, generator=draw)
    width = model.spec.unet.context_width
    rows = [
        Row(x, 300.0, Conditioning(torch.randn(8, width, generator=draw))),
        Row(x, 300.0, Conditioning(torch.randn(8, width, generator=draw))),
    ]
    plain, ours, apart = prepare(model, PLAIN), prepare(model, plan), {}
    runs = {
        "unet": (model.unet, lambda who: who.predict(rows)),
        "decoder": (model.vae.decoder, lambda who: who.decode(x)),
    }
    for name, (net, run) in runs.items():
        expected, handles = plain_taps(net)
        run(plain)
        for handle in handles:
            handle.remove()
        with monkeypatch.context() as patch:
            found = fused_taps(patch)
            run(ours)
        apart[name] = farthest(found, expected)
    return apart


@pytest.mark.parametrize("name", PLANS)
def test_every_tap_agrees(name: str, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = taps_of(tiny, PLANS[name], monkeypatch)
    assert all(each < LIMIT for each in apart.values()), apart


def test_a_wrong_block_is_seen(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from safelight.runtime import layers

    monkeypatch.setattr(layers, "_NEAREST", ((0.0,) * 3,) * 4)
    wrong = dataclasses.replace(WHOLE, winograd=False)
    assert max(taps_of(tiny, wrong, monkeypatch).values()) > LIMIT
