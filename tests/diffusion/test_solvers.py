"""Solvers against closed forms: the constant ray, and a mixture whose ideal denoiser is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from diffusion_toys import Mixture, answer, drive, relative, run

from safelight.diffusion import grid as grids
from safelight.diffusion import noise, solvers
from safelight.diffusion.schedule import Schedule, rates
from safelight.errors import InvalidRequest
from safelight.spec import ScheduleSpec

DETERMINISTIC = [name for name, info in solvers.SOLVERS.items() if not info.stochastic]
STOCHASTIC = [name for name, info in solvers.SOLVERS.items() if info.stochastic]
SHAPE = (3, 4, 4, 4)


def schedule(kind: str = "epsilon") -> Schedule:
    return Schedule.from_spec(ScheduleSpec(prediction_type=kind))  # type: ignore[arg-type]


def draw(seed: int, shape=SHAPE, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the constant ray: a network that always says the same picture -------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_ray(name: str, kind: str) -> None:
    """Every question lies on ``a x0 + s eps``, and the end is x0 (or the ray at ā[0])."""
    plan_of = schedule(kind)
    x0, eps = draw(1), draw(2)
    # The reference's PNDM combines raw v outputs, which turn along the ray: it leaves it.
    options = {"v_history": "eps"} if (name, kind) == ("pndm", "v") else {}
    for n, spacing in ((1, "leading"), (5, "leading"), (20, "leading"), (20, "trailing")):
        plan = grids.timesteps(plan_of, n, spacing, sampler=name).start_at(0)
        start = solvers.add_noise(x0, eps, plan.start_sigma)
        end, asked = drive(
            solvers.solve(name, start, plan_of, plan, **options),
            lambda ask: answer(kind, ask.x, x0, ask.sigma),
        )
        for ask in asked:
            a, s = rates(ask.sigma)
            assert relative(ask.x, a * x0 + s * eps) < 1e-9
        a, s = rates(plan_of.sigma(0)) if name in ("ddim", "pndm") else (1.0, 0.0)
        assert relative(end, a * x0 + s * eps) < 1e-9


def test_the_ray_sees_a_fault() -> None:
    """A network that is told the wrong level leaves the ray."""
    plan = grids.timesteps(schedule(), 10, sampler="dpm++2m").start_at(0)
    x0, eps = draw(1), draw(2)
    start = solvers.add_noise(x0, eps, plan.start_sigma)
    _, asked = drive(
        solvers.solve("dpm++2m", start, schedule(), plan),
        lambda ask: answer("epsilon", ask.x, x0, ask.sigma * 1.001),
    )
    a, s = rates(asked[-1].sigma)
    assert relative(asked[-1].x, a * x0 + s * eps) > 1e-5


def test_final_alpha_one_ends_ddim_and_pndm_on_the_picture() -> None:
    plan_of = Schedule.from_spec(ScheduleSpec(final_alpha_one=True))
    x0, eps = draw(1), draw(2)
    for name in ("ddim", "pndm"):
        plan = grids.timesteps(plan_of, 10, sampler=name).start_at(0)
        start = solvers.add_noise(x0, eps, plan.start_sigma)
        end = run(name, start, plan_of, plan, lambda ask: answer("epsilon", ask.x, x0, ask.sigma))
        assert relative(end, x0) < 1e-9


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_solvers_end_on_a_certain_picture(name: str) -> None:
    x0 = draw(1)
    plan = grids.timesteps(schedule(), 12, sampler=name)
    end = run(
        name,
        draw(2),
        schedule(),
        plan,
        lambda ask: answer("epsilon", ask.x, x0, ask.sigma),
        noise=noise.step_noise(0, SHAPE),
    )
    # LCM keeps c_skip of the sample; DDPM leaves the variance of its last step, from t = 1.
    assert relative(end, x0) < 1e-4


def test_zero_terminal_snr_starts_from_noise_alone() -> None:
    plan_of = Schedule.from_spec(
        ScheduleSpec(zero_terminal_snr=True, prediction_type="v", final_alpha_one=True)
    )
    x0 = draw(1)
    for name in ("ddim", "ddpm", "dpm++2m", "euler", "unipc", "heun"):
        plan = grids.timesteps(plan_of, 10, "trailing", sampler=name)
        end = run(
            name,
            draw(2),
            plan_of,
            plan,
            lambda ask: answer("v", ask.x, x0, ask.sigma),
            noise=noise.step_noise(0, SHAPE),
        )
        assert relative(end, x0) < 1e-5, name
    with pytest.raises(InvalidRequest, match="noise only"):
        grids.timesteps(Schedule(plan_of.alphas_cumprod), 10, "trailing", sampler="ddim")


# --- a Gaussian mixture: the probability-flow ODE and its distribution ----------------------------

MIXTURE = Mixture()


@cache
def flow_end(high: float, low: float) -> torch.Tensor:
    """Where the exact flow takes ``draw(3, (512,))`` from ``high`` to ``low``, in VP scale."""
    fine = torch.linspace(math.log(high), math.log(low), 400, dtype=torch.float64).exp().tolist()
    return MIXTURE.flow(draw(3, (512,)), fine) * rates(low)[0]


def flow_error(name: str, n: int, function: Callable | None = None, **options) -> float:
    """Root mean square distance to the exact flow, at the schedule's smallest sigma."""
    plan_of = schedule()
    extra = {} if name in ("ddim", "pndm") else {"final_sigma": "min"}
    spacing = "leading" if name == "pndm" else "exponential"
    plan = grids.timesteps(plan_of, n, spacing, sampler=name, **extra).start_at(0)
    x = draw(3, (512,))
    start = function or partial(solvers.solve, name)
    end, _ = drive(start(x, plan_of, plan, **options), MIXTURE.network("epsilon"))
    truth = flow_end(round(plan.sigmas[0], 12), plan_of.sigma(0))
    return float((end - truth).square().mean().sqrt())


@pytest.mark.parametrize(
    ("name", "order", "options"),
    [
        ("ddim", 1, {}),
        ("euler", 1, {}),
        ("dpm++2m", 2, {}),
        ("dpm++2m", 2, {"variant": "heun"}),
        ("unipc", 2, {}),
        ("unipc", 2, {"variant": "bh1"}),
        ("heun", 2, {}),
        ("dpm++3m", 2, {}),
        ("dpm++3m", 3, {"bend": "taylor"}),
        ("unipc", 3, {"order": 3}),
        ("lms", 3, {}),
    ],
)
def test_order_of_accuracy(name: str, order: int, options: dict) -> None:
    """Twice the steps divide the error by about 2^order."""
    coarse, fine = flow_error(name, 81, **options), flow_error(name, 161, **options)
    assert math.log2(coarse / fine) > order - 0.35, (coarse, fine)
    assert fine < (2e-2, 2e-3, 1e-3)[order - 1]


def test_pndm_converges() -> None:
    assert flow_error("pndm", 100) < 5e-3 < flow_error("pndm", 10)


def test_the_order_check_sees_a_fault() -> None:
    """DPM++ 2M held to first order must fail the second-order bound."""
    function = solvers.SOLVERS["dpm++2m"].function
    coarse, fine = (flow_error("dpm++2m", n, function, order=1) for n in (81, 161))
    assert math.log2(coarse / fine) < 1.3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddpm", {}),
        ("ddim", {"eta": 1.0}),
        ("euler-a", {}),
        ("dpm++2m-sde", {}),
        ("dpm++3m-sde", {}),
        ("euler", {"s_churn": 20.0, "churn": "paper"}),
        ("ddim", {}),
        ("dpm++2m", {}),
    ],
)
def test_distribution(name: str, options: dict) -> None:
    """100 steps from noise give the mixture: Wasserstein-1 distance of the sorted samples."""
    plan_of, count = schedule(), 20_000
    plan = grids.timesteps(plan_of, 100, "trailing", sampler=name)
    source = noise.sequential(torch.Generator().manual_seed(7), (count,), torch.float64)
    x = draw(11, (count,))
    end = run(name, x, plan_of, plan, MIXTURE.network("epsilon"), noise=source, **options)
    pick = draw(12, (count,)) > 0
    truth = torch.where(pick, 1.0, -1.0) + 0.3 * draw(13, (count,))
    assert float((end.sort().values - truth.sort().values).abs().mean()) < 0.04


def test_the_reference_s_third_order_sign_is_wrong() -> None:
    """Why ``bend`` deviates from the reference by default: on a known distribution, it is worse."""
    plan_of, count = schedule(), 4000
    plan = grids.timesteps(plan_of, 20, "exponential", sampler="dpm++3m-sde")
    truth = (torch.where(draw(12, (count,)) > 0, 1.0, -1.0) + 0.3 * draw(13, (count,))).sort()

    def distance(bend: str) -> float:
        source = noise.sequential(torch.Generator().manual_seed(7), (count,), torch.float64)
        end = run(
            "dpm++3m-sde",
            draw(11, (count,)),
            plan_of,
            plan,
            MIXTURE.network("epsilon"),
            noise=source,
            bend=bend,
        )
        return float((end.sort().values - truth.values).abs().mean())

    assert distance("authors") < 0.08
    assert distance("diffusers") > 2 * distance("authors")


def test_brownian_noise_couples_step_counts() -> None:
    """With the same path, more steps refine the same sample; with fresh noise they make another."""
    plan_of, shape = schedule(), (400,)
    x = draw(3, shape)

    def end(n: int, source: noise.Noise) -> torch.Tensor:
        plan = grids.timesteps(plan_of, n, "karras", sampler="dpm++2m-sde")
        return run("dpm++2m-sde", x, plan_of, plan, MIXTURE.network("epsilon"), noise=source)

    path, fresh = noise.brownian_noise(1, shape), noise.step_noise(1, shape)
    coupled = (end(100, path) - end(200, path)).abs().mean()
    loose = (end(100, fresh) - end(200, fresh)).abs().mean()
    assert coupled < 0.25 * loose


# --- the protocol ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(solvers.SOLVERS))
def test_a_picture_does_not_depend_on_its_batch(name: str) -> None:
    plan = grids.timesteps(schedule(), 7, sampler=name)
    network = MIXTURE.network("epsilon")
    shape = (4, 4, 4)
    xs = [noise.initial_noise(9, shape, picture=k) for k in range(3)]
    together = run(
        name,
        torch.stack(xs),
        schedule(),
        plan,
        network,
        noise=noise.batched([noise.brownian_noise(9, shape, k) for k in range(3)]),
    )
    for k, x in enumerate(xs):
        alone = run(
            name, x[None], schedule(), plan, network, noise=noise.brownian_noise(9, shape, k)
        )
        assert torch.equal(together[k], alone[0])


@pytest.mark.parametrize("name", list(solvers.SOLVERS))
def test_calls_and_questions(name: str) -> None:
    plan = grids.timesteps(schedule(), 9, sampler=name)
    expected = {"pndm": 10, "heun": 17}.get(name, 9)
    assert solvers.calls(name, plan) == expected
    x = draw(0, dtype=torch.bfloat16)
    end, asked = drive(
        solvers.solve(name, x, schedule(), plan, noise=noise.step_noise(0, SHAPE)),
        lambda ask: torch.zeros_like(ask.x),
    )
    assert [ask.index for ask in asked] == list(range(expected))
    assert {ask.total for ask in asked} == {expected}
    assert all(ask.x.dtype == torch.bfloat16 for ask in asked)
    assert end.dtype == torch.float32
    assert torch.equal(x, draw(0, dtype=torch.bfloat16)), "the caller's start was written to"


def test_interleaved_runs_do_not_touch_each_other() -> None:
    plan = grids.timesteps(schedule(), 8, sampler="pndm")
    network = MIXTURE.network("epsilon")
    alone = [run("pndm", draw(k), schedule(), plan, network) for k in range(2)]
    running = [solvers.solve("pndm", draw(k), schedule(), plan) for k in range(2)]
    asks = [next(s) for s in running]
    ends: list[torch.Tensor] = []
    while len(ends) < 2:
        for k, solver in enumerate(running):
            try:
                asks[k] = solver.send(network(asks[k]))
            except StopIteration as end:
                ends.append(end.value)
    assert all(torch.equal(a, b) for a, b in zip(alone, ends, strict=True))


def test_preview() -> None:
    plan = grids.timesteps(schedule("v"), 5, sampler="euler")
    x0 = draw(1)
    _, asked = drive(
        solvers.solve("euler", draw(2), schedule("v"), plan),
        lambda ask: answer("v", ask.x, x0, ask.sigma),
    )
    for ask in asked:
        assert relative(ask.denoised(answer("v", ask.x, x0, ask.sigma)), x0) < 1e-9


@pytest.mark.parametrize("name", ["pndm", "lms"])
def test_exact_starts_inside_the_grid_stay_on_the_ray(name: str) -> None:
    """The reference's PNDM lags and its LMS overshoots there; the named options do not."""
    option = {"pndm": {"restart": "exact"}, "lms": {"warmup": "exact"}}[name]
    x0, eps = draw(1), draw(2)
    plan = grids.strength(schedule(), 20, 0.6, sampler=name)
    start = solvers.add_noise(x0, eps, plan.start_sigma)

    def furthest(**options) -> float:
        solver = solvers.solve(name, start, schedule(), plan, **options)
        _, asked = drive(solver, lambda ask: answer("epsilon", ask.x, x0, ask.sigma))
        assert len(asked) == solvers.calls(name, plan, **options)
        worst = 0.0
        for ask in asked:
            a, s = rates(ask.sigma)
            worst = max(worst, relative(ask.x, a * x0 + s * eps))
        return worst

    assert furthest(**option) < 1e-9
    assert furthest() > 1e-4


def test_misuse_is_refused() -> None:
    plan_of = schedule()
    plan = grids.timesteps(plan_of, 5, sampler="ddim")
    for name, options, message in [
        ("dddim", {}, "no solver"),
        ("euler", {}, "grid made for table"),
        ("ddim", {"s_churn": 1.0}, "no option"),
        ("ddpm", {}, "noise source"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            solvers.solve(name, draw(0), plan_of, plan, **options)
    with pytest.raises(InvalidRequest, match="stochastic"):
        run("ddim", draw(0), plan_of, plan, lambda ask: ask.x, eta=0.5)
