"""Each solver, step by step, against diffusers' scheduler of the same name.

Both are given the reference's own float32 ā table, the same start and the same predictions; the
input of every network call and the final sample must agree to 1e-5 of their norm in float32.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import pytest
import torch
from diffusion_toys import Mixture, answer, drive, relative

from safelight.diffusion import grid as grids
from safelight.diffusion import noise, solvers
from safelight.diffusion.schedule import Schedule

diffusers = pytest.importorskip("diffusers")

KINDS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
EVEN = ("leading", "trailing", "linspace")
SHAPE = (2, 4, 8, 8)
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One of our solvers with options, and the reference configured to the same."""

    solver: str
    reference: str
    spacings: tuple[str, ...] = EVEN
    kinds: tuple[str, ...] = ("epsilon", "v", "x0")
    config: dict = field(default_factory=dict)
    step: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    grid: dict = field(default_factory=dict)
    # The third-order coefficients lose up to 1e-7 / h^3 in the reference's float32 logarithms: it
    # is given its own sigmas in float64, and everything else stays as it is.
    wide_sigmas: bool = False
    counts: tuple[int, ...] = (4, 25)

    def __str__(self) -> str:
        return " ".join([self.solver, *(f"{k}={v}" for k, v in (self.options | self.grid).items())])


DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
ALL = (*EVEN, "karras", "exponential")
LATENT = {"clip_sample": False, "set_alpha_to_one": False}
SDE = {"algorithm_type": "sde-dpmsolver++"}
CHURN = {"s_churn": 5.0, "s_tmin": 0.05, "s_noise": 1.003}
CASES = [
    Case("ddim", "DDIMScheduler", config=LATENT),
    Case("ddim", "DDIMScheduler", config={**LATENT, "set_alpha_to_one": True}),
    Case("ddim", "DDIMScheduler", config=LATENT, step={"eta": 1.0}, options={"eta": 1.0}),
    Case(
        "ddim",
        "DDIMScheduler",
        config={"clip_sample": True},
        step={"eta": 0.5, "use_clipped_model_output": True},
        options={"eta": 0.5, "clip": 1.0, "clipped_eps": True},
    ),
    Case(
        "ddim",
        "DDIMScheduler",
        ("trailing", "linspace"),
        ("v",),
        config={**LATENT, "rescale_betas_zero_snr": True},
    ),
    Case("ddpm", "DDPMScheduler", config={"clip_sample": False}),
    Case(
        "ddpm",
        "DDPMScheduler",
        config={"clip_sample": False, "variance_type": "fixed_large"},
        options={"variance": "fixed_large"},
    ),
    Case(
        "ddpm",
        "DDPMScheduler",
        config={
            "clip_sample": True,
            "clip_sample_range": 5.0,
            "variance_type": "fixed_small_log",
            "beta_schedule": "squaredcos_cap_v2",
        },
        options={"variance": "fixed_small_log", "clip": 5.0},
        kinds=("x0",),
    ),
    Case("pndm", "PNDMScheduler", kinds=("epsilon", "v"), config={"skip_prk_steps": True}),
    Case("lcm", "LCMScheduler", ("leading",), config=LATENT),
    Case("euler", "EulerDiscreteScheduler", ALL),
    Case(
        "euler",
        "EulerDiscreteScheduler",
        config={"final_sigmas_type": "sigma_min"},
        grid={"final_sigma": "min"},
    ),
    Case("euler", "EulerDiscreteScheduler", kinds=("epsilon", "v"), step=CHURN, options=CHURN),
    Case("euler-a", "EulerAncestralDiscreteScheduler", kinds=("epsilon", "v")),
    Case("heun", "HeunDiscreteScheduler", ALL),
    Case("lms", "LMSDiscreteScheduler", ALL, counts=(4, 10)),
    Case("dpm++2m", DPM, ALL),
    Case("dpm++2m", DPM, ("trailing",), ("v",), config={"rescale_betas_zero_snr": True}),
    Case("dpm++2m", DPM, config={"final_sigmas_type": "sigma_min"}, grid={"final_sigma": "min"}),
    Case(
        "dpm++2m",
        DPM,
        ALL,
        config={"solver_type": "heun", "euler_at_final": True},
        options={"variant": "heun", "euler_at_final": True},
    ),
    Case(
        "dpm++2m",
        DPM,
        ALL,
        config={"lower_order_final": False},
        options={"lower_order_final": False},
    ),
    Case("dpm++2m-sde", DPM, ALL, config=SDE),
    Case("dpm++2m-sde", DPM, config={**SDE, "solver_type": "heun"}, options={"variant": "heun"}),
    Case("dpm++3m", DPM, ALL, config={"solver_order": 3}, wide_sigmas=True),
    Case(
        "dpm++3m-sde",
        DPM,
        config={**SDE, "solver_order": 3},
        options={"bend": "diffusers"},
        wide_sigmas=True,
    ),
    Case("unipc", UNIPC, ALL),
    Case("unipc", UNIPC, config={"solver_type": "bh1"}, options={"variant": "bh1"}),
    Case("unipc", UNIPC, config={"solver_order": 3}, options={"order": 3}, wide_sigmas=True),
]


def reference_of(case: Case, spacing: str, kind: str):
    """diffusers' scheduler for a case, before ``set_timesteps``."""
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": KINDS[kind],
        "steps_offset": 1,
        **case.config,
    }
    if spacing in EVEN:
        config["timestep_spacing"] = spacing
    else:
        config[f"use_{spacing}_sigmas"] = True
    return getattr(diffusers, case.reference)(**config)


def compare(case: Case, spacing: str, kind: str, n: int, begin: int = 0, **changes) -> float:
    """The largest relative difference over all calls and the end."""
    ref = reference_of(case, spacing, kind)
    ref.set_timesteps(n)
    if case.wide_sigmas:
        ref.sigmas = ref.sigmas.double()
    schedule = Schedule(
        ref.alphas_cumprod, kind, final_alpha_one=ref.config.get("set_alpha_to_one", False)
    )
    plan = grids.timesteps(
        schedule, n, None if case.solver == "lcm" else spacing, sampler=case.solver, **case.grid
    )
    draws = torch.Generator().manual_seed(n)
    x = torch.randn(SHAPE, generator=draws)
    timesteps = ref.timesteps[begin * ref.order :]
    predictions = [torch.randn(SHAPE, generator=draws) for _ in timesteps]
    if begin:
        image = torch.randn(SHAPE, generator=draws)
        plan = plan.start_at(begin)
        if hasattr(ref, "set_begin_index"):
            ref.set_begin_index(begin * ref.order)
        theirs = ref.add_noise(image, x, timesteps[:1].repeat(2))
        x = solvers.add_noise(image, x, plan.start_sigma)
    else:
        theirs = x * ref.init_noise_sigma
    final, asked = drive(
        solvers.solve(
            case.solver,
            x,
            schedule,
            plan,
            noise=noise.sequential(torch.Generator().manual_seed(5), SHAPE),
            **{**case.options, **changes},
        ),
        lambda ask: predictions[ask.index],
    )
    assert len(asked) == len(timesteps) == asked[0].total == solvers.calls(case.solver, plan)
    extra = dict(case.step)
    if "generator" in inspect.signature(ref.step).parameters:
        extra["generator"] = torch.Generator().manual_seed(5)
    worst = 0.0
    for ask, t, prediction in zip(asked, timesteps, predictions, strict=True):
        # exponential: the reference cuts fractions off, and float32 decides between 999 and 998
        off = 1.01 if spacing == "exponential" and plan.family == "multistep" else 1e-3
        assert abs(ask.timestep - float(t)) < off
        worst = max(worst, relative(ask.x, ref.scale_model_input(theirs, t)))
        theirs = ref.step(prediction, t, theirs, **extra).prev_sample
    if case.grid.get("final_sigma") == "min" and plan.family == "sigma":
        theirs = theirs / (1 + plan.targets[-1] ** 2) ** 0.5  # ours ends in VP scale
    return max(worst, relative(final, theirs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_by_step(case: Case) -> None:
    for spacing in case.spacings:
        for kind in case.kinds:
            for n in case.counts:
                assert compare(case, spacing, kind, n) <= TOLERANCE, (spacing, kind, n)


@pytest.mark.parametrize("case", [c for c in CASES if "zero" not in str(c.config)], ids=str)
@pytest.mark.parametrize("begin", [1, 2, 6])
def test_image_to_image(case: Case, begin: int) -> None:
    kind = case.kinds[0]
    assert compare(case, case.spacings[0], kind, 20, begin=begin) <= TOLERANCE


@pytest.mark.parametrize("case", [c for c in CASES if c.wide_sigmas], ids=str)
def test_third_order_in_float32_throughout(case: Case) -> None:
    """With predictions that change as a network's do, the reference needs no wider sigmas."""
    ref = reference_of(case, "linspace", "epsilon")
    ref.set_timesteps(50)
    schedule = Schedule(ref.alphas_cumprod)
    plan = grids.timesteps(schedule, 50, "linspace", sampler=case.solver)
    draws = torch.Generator().manual_seed(0)
    theirs = x = torch.randn(SHAPE, generator=draws)
    mixture, predictions, inputs = Mixture(), [], []
    generator = torch.Generator().manual_seed(5)
    extra = (
        {"generator": generator} if "generator" in inspect.signature(ref.step).parameters else {}
    )
    for sigma, t in zip(plan.sigmas, ref.timesteps, strict=True):
        clean = mixture.denoise(theirs, sigma)
        predictions.append(answer("epsilon", theirs.double(), clean, sigma).float())
        inputs.append(theirs)
        theirs = ref.step(predictions[-1], t, theirs, **extra).prev_sample
    source = noise.sequential(torch.Generator().manual_seed(5), SHAPE)
    final, asked = drive(
        solvers.solve(case.solver, x, schedule, plan, noise=source, **case.options),
        lambda ask: predictions[ask.index],
    )
    assert relative(final, theirs) <= TOLERANCE
    for ask, their in zip(asked, inputs, strict=True):
        assert relative(ask.x, their) <= TOLERANCE


def test_every_solver_is_compared() -> None:
    assert {case.solver for case in CASES} == set(solvers.SOLVERS)


@pytest.mark.parametrize("n", [1, 2, 3, 49])
@pytest.mark.parametrize("solver", ["ddim", "pndm", "euler", "dpm++2m", "unipc", "lms"])
def test_odd_step_counts(solver: str, n: int) -> None:
    case = next(c for c in CASES if c.solver == solver)
    assert compare(case, "leading", "epsilon", n) <= TOLERANCE


@pytest.mark.parametrize(
    ("solver", "fault"),
    [
        ("ddim", {"eta": 0.02}),
        ("pndm", {"v_history": "eps"}),
        ("dpm++2m", {"variant": "heun"}),
        ("dpm++3m", {"lower_order_final": False}),
        ("dpm++3m-sde", {"bend": "authors"}),
        ("dpm++3m", {"bend": "taylor"}),
        ("unipc", {"variant": "bh1"}),
        ("unipc", {"corrector": False}),
        ("euler-a", {"eta": 0.99}),
        ("lms", {"order": 3}),
        ("euler", {"s_churn": 0.1}),
        ("ddpm", {"variance": "fixed_large"}),
        ("lcm", {"timestep_scaling": 0.1}),
    ],
)
def test_a_planted_fault_is_seen(solver: str, fault: dict) -> None:
    case = next(c for c in CASES if c.solver == solver)
    kind = "v" if "v" in case.kinds and solver == "pndm" else "epsilon"
    assert compare(case, case.spacings[0], kind, 10, **fault) > 10 * TOLERANCE


def test_a_wrong_table_is_seen() -> None:
    """A beta_end off by 1 % must fail: the check is not blind to the schedule."""
    case = next(c for c in CASES if c.solver == "dpm++2m")
    ref = reference_of(case, "linspace", "epsilon")
    off = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.01212, beta_schedule="scaled_linear"
    )
    ref.set_timesteps(10)
    plan = grids.timesteps(Schedule(off.alphas_cumprod), 10, sampler="dpm++2m")
    assert abs(plan.sigmas[0] / float(ref.sigmas[0]) - 1) > 1e-3


def test_zero_terminal_snr_euler_where_the_reference_loses_digits() -> None:
    """At sigma 4096 float32 keeps three digits of what remains after the first step: the reference
    is compared to what they hold, and our float32 to our float64, exactly."""
    case = Case(
        "euler", "EulerDiscreteScheduler", config={"rescale_betas_zero_snr": True}, kinds=("v",)
    )
    assert compare(case, "trailing", "v", 10) < 3e-4
    ref = reference_of(case, "trailing", "v")
    schedule = Schedule(ref.alphas_cumprod, "v")
    plan = grids.timesteps(schedule, 10, "trailing", sampler="euler")
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))

    def end(x: torch.Tensor) -> torch.Tensor:
        return drive(solvers.solve("euler", x, schedule, plan), lambda ask: -0.5 * ask.x)[0]

    assert relative(end(x), end(x.double())) < 1e-6


def test_the_reference_in_float16_sees_the_same_solver() -> None:
    """Questions are asked in the network's dtype; arithmetic stays in float32."""
    schedule = Schedule(reference_of(CASES[0], "leading", "epsilon").alphas_cumprod)
    for name in solvers.SOLVERS:
        plan = grids.timesteps(schedule, 6, sampler=name)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).half()
        source = noise.step_noise(3, SHAPE)
        end, asked = drive(
            solvers.solve(name, x, schedule, plan, noise=source), lambda ask: ask.x * 0.5
        )
        assert {ask.x.dtype for ask in asked} == {torch.float16}
        assert end.dtype == torch.float32
