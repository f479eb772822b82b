"""Block caching and the frozen context, against slow references made of hooks on the plain network.

A reference runs the whole network at every call and puts what was remembered in the place of what
was computed; so it shares no code with what it checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safelight.conditioning import Conditioning
from safelight.diffusion import grid, guidance, solvers
from safelight.diffusion.noise import initial_noise
from safelight.engine import Engine, Picture
from safelight.errors import InvalidRequest
from safelight.model import Model
from safelight.nets.attention import TransformerBlock
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.runtime import PLAIN, Row, Saving, prepare
from safelight.runtime.caching import Memory, Use, branch_count, whole_calls
from safelight.spec import ModelSpec, ScheduleSpec, UNetSpec, VAESpec

UNETS = {
    "two levels": UNetSpec(
        sample_size=8,
        channels=(8, 16),
        attention=(True, True),
        heads=(2, 2),
        only_cross_attention=(True, False),
        layers_per_block=1,
        context_width=12,
        norm_groups=4,
    ),
    "four levels": UNetSpec(
        sample_size=8, channels=(8, 8, 16, 16), heads=(2, 2, 2, 2), context_width=12, norm_groups=4
    ),
}
STEPS = 6
CLOSE = 2e-4


@cache
def model(name: str = "two levels", *, plain: bool = False) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        spec = ModelSpec(
            name="micro",
            unet=UNETS[name],
            vae=VAESpec(channels=(8, 8), layers_per_block=1, norm_groups=4),
            schedule=ScheduleSpec(prediction_type="v"),
        )
        made = Model(spec=spec, unet=UNet(spec.unet), vae=VAE(spec.vae))
    if plain:
        made.runtime = prepare(made, PLAIN)
    return made


def conditions(seed: int) -> list[Conditioning]:
    generator = torch.Generator().manual_seed(seed)
    return [Conditioning(torch.randn(5, 12, generator=generator)) for _ in range(2)]


def solver(made: Model, seed: int) -> Any:
    plan = grid.timesteps(made.schedule, STEPS, sampler="dpm++2m")
    return solvers.solve("dpm++2m", initial_noise(seed, (1, 4, 8, 8)), made.schedule, plan)


def picture(made: Model, seed: int = 0, until: float = 1.0, **saving: Any) -> Picture:
    left_out = Saving(**saving) if saving else None
    program = guidance.program(3.0, share=until)
    return Picture(solver(made, seed), conditions(seed), program, saving=left_out)


def run(made: Model, *pictures: Picture) -> list[Tensor]:
    Engine(made).run(pictures)
    return [each.result() for each in pictures]


def near(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) < CLOSE


# -- the references -------------------------------------------------------------------------------

Answer = Callable[[int, Tensor, float], Tensor]


@torch.no_grad()
def driven(made: Model, seed: int, answer: Answer) -> Tensor:
    """A run whose questions ``answer(index, x, timestep)`` answers, guidance included."""
    run = solver(made, seed)
    ask = next(run)
    try:
        while True:
            ask = run.send(answer(ask.index, ask.x, ask.timestep))
    except StopIteration as stop:
        return stop.value


def guided(unet: nn.Module, x: Tensor, t: float, seed: int) -> Tensor:
    u, c = (unet(x, torch.tensor([t]), each.tokens[None]) for each in conditions(seed))
    return guidance.cfg(u, c, 3.0)


def slow_cache(made: Model, seed: int, branch: int, whole: Sequence[int]) -> Tensor:
    """DeepCache: the layer that reads a skip connection is handed old features beside it."""
    unet = made.unet
    layers = [resnet for block in unet.up_blocks for resnet in block.resnets]  # type: ignore[union-attr]
    reader: Any = layers[len(layers) - 1 - branch]
    kept: list[Tensor] = []
    calls = iter(range(10**6))
    skips = _skip_widths(unet.spec)

    def swap(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        both, time = inputs
        width = both.shape[1] - skips[branch]
        index, row = divmod(next(calls), 2)
        if index in whole:
            kept[row : row + 1] = [both[:, :width].clone()]
            return inputs
        return torch.cat([kept[row], both[:, width:]], dim=1), time

    handle = reader.register_forward_pre_hook(swap)
    try:
        return driven(made, seed, lambda _, x, t: guided(unet, x, t, seed))
    finally:
        handle.remove()


def _skip_widths(spec: UNetSpec) -> list[int]:
    widths = [spec.channels[0]]
    for level, width in enumerate(spec.channels):
        widths += [width] * (spec.layers_per_block + (level < len(spec.channels) - 1))
    return widths


def slow_gate(made: Model, seed: int, gate: int) -> Tensor:
    """T-GATE: before the gate guided; from it on the prompt alone, and every cross-attention says
    the mean of what it said for the two branches of the last guided step."""
    unet = made.unet
    blocks = [part for part in unet.modules() if isinstance(part, TransformerBlock)]
    crosses = [a for b in blocks for a in ([b.attn1] if b.only_cross else []) + [b.attn2]]
    said: dict[int, list[Tensor]] = {}
    now = {"index": 0}

    def listen(place: int) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor | None:
            if now["index"] == gate - 1:
                said.setdefault(place, []).append(out)
            return torch.stack(said[place]).mean(0) if now["index"] >= gate else None

        return hook

    handles = [part.register_forward_hook(listen(k)) for k, part in enumerate(crosses)]

    def answer(index: int, x: Tensor, t: float) -> Tensor:
        now["index"] = index
        if index < gate:
            return guided(unet, x, t, seed)
        return unet(x, torch.tensor([t]), conditions(seed)[1].tokens[None])

    try:
        return driven(made, seed, answer)
    finally:
        for handle in handles:
            handle.remove()


# -- block caching --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "interval", "expected"),
    [(6, 1, range(6)), (6, 2, (0, 2, 4)), (7, 3, (0, 3, 6)), (3, 9, (0,))],
)
def test_whole_calls_evenly(total: int, interval: int, expected: Sequence[int]) -> None:
    assert sorted(whole_calls(total, interval)) == list(expected)


def test_whole_calls_closest_together_a_third_into_the_run() -> None:
    # DeepCache's sample_from_quad_center(50, 10, center=15, pow=1.4), worked out by hand from its
    # formula: floor(sign(v) |v|^1.4 + 15), v evenly from -15^(1/1.4) to 35^(1/1.4).
    low, high = -(15 ** (1 / 1.4)), 35 ** (1 / 1.4)
    marks = [low + k * (high - low) / 10 for k in range(10)]
    expected = {int((abs(v) ** 1.4) * (1 if v > 0 else -1) + 15 + 1e-9) for v in marks}
    found = whole_calls(50, 5, "quadratic")
    assert found == expected
    assert 0 in found
    gaps = torch.tensor(sorted(found)).diff()
    middle = [g for at, g in zip(sorted(found), gaps.tolist(), strict=False) if 8 <= at <= 18]
    assert max(middle) < int(gaps[-1])
    assert len(found) == 10


@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", list(UNETS))
def test_block_caching_is_the_slow_reference(name: str, plain: bool, spacing: Any) -> None:
    made = model(name, plain=plain)
    exact = run(made, picture(made))[0]
    whole = sorted(whole_calls(STEPS, 3, spacing))
    for branch in range(0, branch_count(made.spec.unet), 1 if name == "two levels" else 3):
        found = run(made, picture(made, interval=3, branch=branch, spacing=spacing))[0]
        expected = slow_cache(made, 0, branch, whole)
        assert near(found, expected), (branch, float((found - expected).abs().max()))
        assert not near(found, exact), "it would not be caching"


def test_an_interval_of_one_is_exact_to_the_bit() -> None:
    made = model()
    exact, same = (run(made, picture(made, **kw))[0] for kw in ({}, {"interval": 1, "branch": 2}))
    assert torch.equal(exact, same)
    # Writing what will be read later moves no bit either.
    rows = [Row(torch.randn(1, 4, 8, 8), 500.0, each) for each in conditions(1)]
    kept = [row._replace(use=Use(Memory(), branch=1)) for row in rows]
    assert torch.equal(made.runtime.predict(rows), made.runtime.predict(kept))


def test_short_calls_compute_less() -> None:
    made = model("four levels")
    rows = [Row(torch.randn(1, 4, 8, 8), 500.0, each) for each in conditions(1)]
    uses = [Use(Memory(), branch=0) for _ in rows]
    made.runtime.predict([row._replace(use=use) for row, use in zip(rows, uses, strict=True)])
    unet = made.runtime._fused_unet
    assert unet is not None
    route = unet.route(0)
    assert (route.down, len(route.resnets), len(route.crosses)) == (0, 1, 1)
    assert len(unet._resnets) == 22


# -- frozen context -------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [1, 3, 5])
@pytest.mark.parametrize("name", list(UNETS))
def test_a_frozen_context_is_the_slow_reference(name: str, gate: int) -> None:
    made, share = model(name), gate / STEPS
    found = run(made, picture(made, until=share, freeze_after=share))[0]
    assert near(found, slow_gate(made, 0, gate))
    assert not near(found, run(made, picture(made, until=share))[0]), "it would not be frozen"


def test_a_gate_at_the_end_is_exact_to_the_bit() -> None:
    made = model()
    gated = run(made, picture(made, until=1.0, freeze_after=1.0))[0]
    assert torch.equal(gated, run(made, picture(made))[0])


def test_a_frozen_context_needs_the_laid_out_network() -> None:
    made = model(plain=True)
    one = picture(made, until=0.5, freeze_after=0.5)
    Engine(made).run([one])
    with pytest.raises(InvalidRequest, match="freeze_context"):
        one.result()


# -- together -------------------------------------------------------------------------------------

MIX: list[dict[str, Any]] = [
    {},
    {"until": 0.5},
    {"interval": 2, "branch": 0},
    {"interval": 2, "branch": 2},
    {"interval": 3, "branch": 1, "spacing": "quadratic"},
    {"until": 0.5, "freeze_after": 0.5},
    {"until": 0.34, "freeze_after": 0.34, "interval": 2, "branch": 1},
]


@pytest.mark.parametrize("plain", [False, True])
def test_pictures_with_different_levers_do_not_meet(plain: bool) -> None:
    made = model(plain=plain)
    mix = [each for each in MIX if not (plain and "freeze_after" in each)]
    alone = [run(made, picture(made, k, **each))[0] for k, each in enumerate(mix)]
    together = run(made, *(picture(made, k, **each) for k, each in enumerate(mix)))
    for k, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert near(one, other), mix[k]


def test_one_that_joins_late_changes_nothing() -> None:
    made, engine = model(), Engine(model())
    first = picture(made, 0, interval=3)
    engine.submit([first])
    engine.advance()
    engine.run([picture(made, 1, interval=2), picture(made, 2)])
    assert near(first.result(), run(made, picture(made, 0, interval=3))[0])


@pytest.mark.parametrize(
    ("program", "rows"),
    [
        (guidance.program(3.0), 2 * STEPS),
        (guidance.program(3.0, share=1.0), 2 * STEPS),
        (guidance.program(3.0, share=0.5), STEPS + 3),
        (guidance.program(3.0, share=0.0), STEPS),
        (guidance.program(1.0, share=0.5), STEPS),
    ],
)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_that_is_off_costs_nothing(program: Any, rows: int, rescale: float) -> None:
    made = model()
    engine = Engine(made)
    engine.run([Picture(solver(made, 0), conditions(0), program, rescale=rescale)])
    assert engine.rows == rows


def test_an_interval_of_guidance_costs_what_lies_in_it() -> None:
    made = model()
    plan = grid.timesteps(made.schedule, STEPS, sampler="dpm++2m")
    low, high = plan.sigmas[4], plan.sigmas[1]
    inside = sum(low < sigma <= high for sigma in plan.sigmas)
    engine = Engine(made)
    program = guidance.program(3.0, low, high)
    engine.run([Picture(solver(made, 0), conditions(0), program)])
    assert (inside, engine.rows) == (3, STEPS + 3)
