"""The engine: mixed requests share calls, and each gets the picture it would get alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from safelight.conditioning import Conditioning
from safelight.diffusion import grid, guidance, solvers
from safelight.diffusion.noise import brownian_noise, initial_noise
from safelight.engine import Engine, NonFinite, Picture, Progress
from safelight.errors import Cancelled
from safelight.model import Model
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.spec import ModelSpec, ScheduleSpec, UNetSpec, VAESpec

SPEC = ModelSpec(
    name="micro",
    unet=UNetSpec(
        sample_size=8,
        channels=(8, 16),
        attention=(True, True),
        heads=(2, 2),
        only_cross_attention=(False, False),
        layers_per_block=1,
        context_width=12,
        norm_groups=4,
    ),
    vae=VAESpec(channels=(8, 8), layers_per_block=1, norm_groups=4),
    schedule=ScheduleSpec(prediction_type="v"),
)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model(spec=SPEC, unet=UNet(SPEC.unet), vae=VAE(SPEC.vae))


def branches(seed: int, length: int = 6) -> list[Conditioning]:
    generator = torch.Generator().manual_seed(seed)
    return [Conditioning(torch.randn(length, 12, generator=generator)) for _ in range(2)]


def picture(
    model: Model,
    seed: int = 0,
    *,
    sampler: str = "dpm++2m",
    steps: int = 6,
    scale: float = 3.0,
    size: int = 8,
    length: int = 6,
    **kwargs: object,
) -> Picture:
    plan = grid.timesteps(model.schedule, steps, sampler=sampler)
    shape = (1, 4, size, size)
    solver = solvers.solve(
        sampler,
        initial_noise(seed, shape),
        model.schedule,
        plan,
        noise=brownian_noise(seed, shape),
    )
    return Picture(solver, branches(seed, length), guidance.program(scale), **kwargs)  # type: ignore[arg-type]


MIXED = [
    {"seed": 1, "sampler": "ddim", "steps": 4, "scale": 1.0},
    {"seed": 2, "sampler": "pndm", "steps": 5, "scale": 7.5},
    {"seed": 3, "sampler": "dpm++2m-sde", "steps": 7},
    {"seed": 4, "sampler": "heun", "steps": 3},
    {"seed": 5, "sampler": "euler-a", "steps": 6, "length": 9},
    {"seed": 6, "sampler": "unipc", "steps": 8, "size": 12},
]


def alone(model: Model, options: dict) -> Tensor:
    engine = Engine(model)
    one = picture(model, **options)
    engine.run([one])
    return one.result()


def test_a_shared_batch_gives_each_its_own_picture(model: Model) -> None:
    engine = Engine(model)
    together = [picture(model, **options) for options in MIXED]
    engine.run(together)
    for options, one in zip(MIXED, together, strict=True):
        expected = alone(model, options)
        assert one.result().shape == expected.shape
        assert float((one.result() - expected).abs().max()) < 1e-4
    assert engine.ticks == 8, "as many as the longest run (unipc) has questions"
    assert engine.calls <= 3 * 8, "one a shape and tick; there are three shapes"


@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_the_size_of_a_call_does_not_matter(model: Model, rows: int) -> None:
    engine = Engine(model, max_rows=rows)
    together = [picture(model, seed) for seed in range(4)]
    engine.run(together)
    for seed, one in enumerate(together):
        assert float((one.result() - alone(model, {"seed": seed})).abs().max()) < 1e-4


def test_alone_is_bit_equal(model: Model) -> None:
    engine = Engine(model)
    together = [picture(model, seed, alone=True) for seed in range(3)]
    engine.run([picture(model, 9), *together])
    for seed, one in enumerate(together):
        single = picture(model, seed, alone=True)
        Engine(model).run([single])
        assert torch.equal(one.result(), single.result())


def test_one_call_a_tick(model: Model) -> None:
    engine = Engine(model)
    engine.run([picture(model, seed, steps=5) for seed in range(4)])
    assert engine.ticks == 5
    assert engine.calls == 5


def test_a_picture_joins_while_others_run(model: Model) -> None:
    engine = Engine(model)
    late = picture(model, 7, steps=3)
    started = threading.Event()

    def join(progress: Progress) -> None:
        if progress.index == 2 and not started.is_set():
            started.set()
            engine.submit([late])

    first = picture(model, 1, steps=12, on_step=join)
    engine.run([first])
    late.wait(10)
    assert float((late.result() - alone(model, {"seed": 7, "steps": 3})).abs().max()) < 1e-4
    assert engine.calls < 12 + 3


def test_cancel_ends_within_one_step(model: Model) -> None:
    seen: list[int] = []
    other = picture(model, 2, steps=6)

    def stop(progress: Progress) -> None:
        seen.append(progress.index)
        if progress.index == 1:
            one.cancel()

    one = picture(model, 1, steps=50, on_step=stop)
    Engine(model).run([one, other])
    assert seen == [0, 1]
    with pytest.raises(Cancelled):
        one.result()
    assert other.result().isfinite().all()


def test_many_threads(model: Model) -> None:
    engine = Engine(model)
    results: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        one = picture(model, seed)
        engine.run([one])
        results[seed] = one.result()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for seed in range(6):
        assert float((results[seed] - alone(model, {"seed": seed})).abs().max()) < 1e-4


def test_nan_fails_its_own_picture_only(model: Model) -> None:
    bad = picture(model, 1)
    poisoned: Sequence[Conditioning] = [
        Conditioning(torch.full((6, 12), float("nan"))) for _ in range(2)
    ]
    bad.branches = poisoned
    good = picture(model, 2)
    Engine(model).run([bad, good])
    with pytest.raises(NonFinite, match="step 1"):
        bad.result()
    assert good.result().isfinite().all()


def test_progress_and_previews(model: Model) -> None:
    previews: list[Tensor] = []
    totals: set[int] = set()

    def watch(progress: Progress) -> None:
        totals.add(progress.total)
        previews.append(progress.denoised())

    one = picture(model, 3, steps=5, on_step=watch)
    Engine(model).run([one])
    assert totals == {5}
    assert len(previews) == 5
    # At the last step the preview is the picture: the next level has no noise.
    assert torch.allclose(previews[-1], one.result(), atol=1e-5)


def test_guidance_in_an_interval_costs_one_branch_outside(model: Model) -> None:
    rows: list[int] = []
    engine = Engine(model)
    call = engine._call
    engine._call = lambda part: (rows.append(len(part)), call(part))[1]  # type: ignore[method-assign]
    one = picture(model, 1, steps=8)
    one.program = guidance.program(5.0, 0.5, 3.0)
    engine.run([one])
    assert set(rows) == {1, 2}
