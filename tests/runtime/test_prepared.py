"""A prepared model gives the numbers of its networks, whatever shares a call."""

from __future__ import annotations

import dataclasses
import weakref
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from safelight.conditioning import Conditioning
from safelight.model import Cache, Model
from safelight.nets import lora
from safelight.nets.taps import taps
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.runtime import PLAIN, Prepared, Row, choose, plan, prepare
from safelight.runtime.plan import everything, lean
from safelight.spec import ModelSpec, UNetSpec, VAESpec

SHALLOW = UNetSpec(
    sample_size=8,
    channels=(16, 32),
    attention=(True, True),
    heads=(2, 4),
    only_cross_attention=(False, False),
    layers_per_block=1,
    context_width=24,
    norm_groups=8,
)
DEEP = UNetSpec(
    sample_size=16, channels=(16, 32, 32, 48), heads=(2, 2, 2, 2), context_width=24, norm_groups=8
)
DECODER = VAESpec(channels=(8, 16, 16), layers_per_block=1, norm_groups=4)

UNETS = {
    "tiny": (SHALLOW, (8, 8)),
    "four levels, two layers a block": (DEEP, (8, 8)),
    "odd sizes at every level": (DEEP, (13, 11)),
    "linear projection": (SHALLOW.replace(linear_projection=True, upcast_attention=True), (8, 6)),
    "class vector": (
        SHALLOW.replace(class_embedding="projection", class_embedding_size=10),
        (6, 4),
    ),
    "class label": (SHALLOW.replace(class_embedding="table", class_embedding_size=9), (6, 4)),
    "extra planes": (SHALLOW.replace(in_channels=9), (6, 4)),
    "guidance embedding": (SHALLOW.replace(guidance_embedding_size=12), (6, 4)),
    "attention at the coarsest level only": (SHALLOW.replace(attention=(False, True)), (6, 4)),
    "only cross-attention at the finest": (
        SHALLOW.replace(only_cross_attention=(True, False)),
        (6, 4),
    ),
    "one cell": (SHALLOW, (2, 2)),
    "more rows than a block": (SHALLOW, (32, 24)),
}
PLANS = {
    "all": everything(),
}
for field in ("packed", "transposed", "shared", "folded", "compiled", "winograd", "kept"):
    PLANS[f"not {field}"] = dataclasses.replace(PLANS["all"], **{field: False})
PLANS["not winograd, transposed"] = dataclasses.replace(
    PLANS["all"], winograd=False, transposed=False
)
PLANS["lean"] = lean()


@cache
def model(spec: UNetSpec) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, vae = UNet(spec), VAE(DECODER)
        for net in (unet, vae):
            for name, parameter in net.named_parameters():
                if "norm" in name:  # fresh ones are 1 and 0, which would hide a wrong one
                    parameter.data.add_(torch.randn_like(parameter) * 0.3)
    whole = ModelSpec(name="micro", unet=spec, vae=DECODER)
    return Model(spec=whole, unet=unet, vae=vae)


def rows(spec: UNetSpec, size: tuple[int, int], *, mixed: bool, seed: int = 0) -> list[Row]:
    """Two pictures of three branches, then one of one: as guidance makes them.

    Args:
        mixed: pictures at different timesteps, branches with class vectors of their own.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def told(k: int) -> dict[str, Any]:
        slots: dict[str, Any] = {}
        if spec.class_embedding == "table":
            slots["vector"] = torch.tensor(k % spec.class_embedding_size)
        if spec.class_embedding == "projection":
            slots["vector"] = draw(spec.class_embedding_size)
        if spec.guidance_embedding_size:
            slots["guidance"] = draw(spec.guidance_embedding_size)
        if spec.in_channels > 4:
            slots["planes"] = draw(spec.in_channels - 4, *size)
        return slots

    made, empty = [], draw(7, spec.context_width)
    for k, branches in enumerate((3, 3, 1)):
        x, slots = draw(1, 4, *size), told(k)
        for branch in range(branches):
            tokens = empty if branch == 0 else draw(7, spec.context_width)
            slots = told(10 * k + branch) if mixed else slots
            timestep = 400.0 + 150.5 * k if mixed else 400.0
            made.append(Row(x, timestep, Conditioning(tokens, **slots)))
    return made


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, in standard deviations of ``b``."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.std())


@pytest.mark.parametrize("mixed", [False, True], ids=["together", "mixed"])
@pytest.mark.parametrize("variant", UNETS)
def test_predict_is_the_network(variant: str, mixed: bool) -> None:
    spec, size = UNETS[variant]
    asked = rows(spec, size, mixed=mixed)
    expected = prepare(model(spec), PLAIN).predict(asked)
    assert distance(prepare(model(spec), PLANS["all"]).predict(asked), expected) < 1e-5


@pytest.mark.parametrize("switch", PLANS)
def test_every_switch_by_itself(switch: str) -> None:
    asked = rows(SHALLOW, (8, 8), mixed=True)
    expected = prepare(model(SHALLOW), PLAIN).predict(asked)
    assert distance(prepare(model(SHALLOW), PLANS[switch]).predict(asked), expected) < 1e-5


@pytest.mark.parametrize("switch", PLANS)
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (16, 12)])
def test_decode_is_the_network(size: tuple[int, int], switch: str) -> None:
    latents = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1))
    one = model(SHALLOW)
    expected = one.vae.decode(latents)
    assert distance(prepare(one, PLANS[switch]).decode(latents), expected) < 3e-5


@pytest.mark.parametrize("switch", PLANS)
@pytest.mark.parametrize("size", [(16, 24), (20, 12)])
def test_encode_is_the_network(size: tuple[int, int], switch: str) -> None:
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    one = model(SHALLOW)
    found, expected = prepare(one, PLANS[switch]).encode(pixels), one.vae.encode(pixels)
    assert distance(found.mean, expected.mean) < 1e-5
    assert distance(found.logvar, expected.logvar) < 1e-5


@pytest.mark.parametrize("mixed", [False, True])
def test_rows_do_not_know_their_company(mixed: bool) -> None:
    asked, prepared = rows(SHALLOW, (8, 8), mixed=mixed), prepare(model(SHALLOW))
    together = prepared.predict(asked)
    for row, prediction in zip(asked, together.split(1), strict=True):
        assert distance(prepare(model(SHALLOW)).predict([row]), prediction) < 1e-5


def test_what_is_remembered_moves_no_bit() -> None:
    """A warm model answers as a fresh one, whatever it was asked before."""
    asked, others = rows(DEEP, (8, 8), mixed=True), rows(DEEP, (8, 8), mixed=True, seed=1)
    warm = prepare(model(DEEP))
    warm.predict(others)
    warm.predict(asked[3:] + others[:2])
    assert torch.equal(warm.predict(asked), prepare(model(DEEP)).predict(asked))
    assert torch.equal(warm.predict(asked), warm.predict(asked))


def test_a_prompt_and_a_timestep_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(model(SHALLOW))
    unet, read, timed = prepared._fused_unet, [], []
    assert unet is not None
    reader, timer = unet.read, unet.time
    monkeypatch.setattr(unet, "read", lambda tokens: (read.append(1), reader(tokens))[1])
    monkeypatch.setattr(unet, "time", lambda *told: (timed.append(1), timer(*told))[1])
    asked = rows(SHALLOW, (8, 8), mixed=False)
    for _ in range(3):
        prepared.predict(asked)
    assert len(read) == 5, "the empty prompt is three pictures' own"
    assert len(timed) == 1
    later = [Row(row.x, 20.0, row.conditioning) for row in asked]
    prepared.predict(later)
    prepared.predict(later[2:])
    assert (len(read), len(timed)) == (5, 2)


def test_forgotten_prompts_are_not_confused() -> None:
    """A new tensor at the address of an old one is a new prompt."""
    prepared, plain = prepare(model(SHALLOW)), prepare(model(SHALLOW), PLAIN)
    prepared._reads, prepared._layouts = Cache(2), Cache(1)
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    for seed in range(8):
        tokens = torch.randn(3, 24, generator=torch.Generator().manual_seed(seed))
        for count in (1, 2):
            asked = [Row(x, 7.0, Conditioning(tokens))] * count
            assert distance(prepared.predict(asked), plain.predict(asked)) < 1e-5
        del asked, tokens


def test_a_model_is_freed_with_what_was_prepared() -> None:
    one = Model(spec=model(SHALLOW).spec, unet=UNet(SHALLOW), vae=VAE(DECODER))
    one.runtime.predict(rows(SHALLOW, (8, 8), mixed=False))
    gone = weakref.ref(one.unet)
    del one
    assert gone() is None


def test_the_networks_stay_as_they_are() -> None:
    one = model(DEEP)
    before = {name: tensor.clone() for name, tensor in one.unet.state_dict().items()}
    one.runtime.predict(rows(DEEP, (8, 8), mixed=False))
    after = one.unet.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_acts() -> None:
    one = model(SHALLOW)
    prepared, asked = prepare(one), rows(SHALLOW, (8, 8), mixed=False)
    without = prepared.predict(asked)
    paths = lora.targets(one.unet, lora.UNET_ATTENTION)
    adapter = lora.fresh(one.unet, paths, generator=torch.Generator().manual_seed(0))
    for pair in adapter.pairs.values():
        pair.up.data.fill_(0.1)
    with lora.attach(one.unet, [(adapter, 1.0)]):
        acted = prepared.predict(asked)
        assert distance(acted, prepare(one, PLAIN).predict(asked)) == 0
    assert distance(acted, without) > 1e-3
    assert torch.equal(prepared.predict(asked), without)


def test_a_tap_sees() -> None:
    one = model(SHALLOW)
    with taps(one.unet, ["mid_block"]) as seen:
        prepare(one).predict(rows(SHALLOW, (8, 8), mixed=False))
    assert "mid_block" in seen
    with taps(one.vae, ["decoder.mid_block"]) as seen:
        prepare(one).decode(torch.zeros(1, 4, 4, 4))
    assert "decoder.mid_block" in seen
    with taps(one.vae, ["encoder.mid_block"]) as seen:
        prepare(one).encode(torch.zeros(1, 3, 16, 16))
    assert "encoder.mid_block" in seen


def test_not_a_number_stays_so() -> None:
    asked = rows(SHALLOW, (16, 16), mixed=False)
    asked[1].conditioning.tokens[0, 0] = float("nan")
    answers = prepare(model(SHALLOW)).predict(asked)
    assert [bool(a.isfinite().all()) for a in answers] == [k != 1 for k in range(7)]


def test_a_copy_that_does_not_fit_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(4 * p.numel() for net in (UNet(SHALLOW), VAE(DECODER)) for p in net.parameters())
    chosen = []
    for memory in (4 * weights, 2 * weights):
        monkeypatch.setattr(plan, "_memory", lambda memory=memory: memory)
        chosen.append(choose(model(SHALLOW)))
    assert chosen == [everything(), lean()]
    monkeypatch.setattr(plan, "_memory", lambda: 4 * weights)
    assert choose(model(SHALLOW), others=1) == lean()


def test_the_plan_hangs_on_model_and_machine() -> None:
    one = model(SHALLOW)
    assert choose(one) == choose(one) == everything()
    assert one.kernels == one.runtime.plan.kernels
    assert "fused" in one.kernels
    assert PLAIN.kernels == ("torch",)
    half = Model(spec=one.spec, unet=UNet(SHALLOW), vae=VAE(DECODER), dtype=torch.bfloat16)
    assert choose(half) == PLAIN
    asked = [row._replace(x=row.x.bfloat16()) for row in rows(SHALLOW, (8, 8), mixed=False)]
    asked = [
        row._replace(conditioning=Conditioning(row.conditioning.tokens.bfloat16())) for row in asked
    ]
    assert isinstance(half.runtime, Prepared)
    assert half.runtime.predict(asked).dtype == torch.bfloat16
