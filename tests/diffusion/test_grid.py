"""Timestep lists of every spacing, strength, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers.schedulers import AysSchedules
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.diffusion import grid as grids
from safelight.diffusion.schedule import Schedule
from safelight.errors import InvalidRequest
from safelight.spec import ScheduleSpec

SCHEDULE = Schedule.from_spec(ScheduleSpec())


def ts(n: int, spacing: str | None, sampler: str = "ddim", **options) -> list[float]:
    return list(grids.timesteps(SCHEDULE, n, spacing, sampler=sampler, **options).timesteps)


def test_published_lists() -> None:
    assert ts(20, "leading") == [951 - 50 * k for k in range(20)]
    assert ts(50, "leading")[:1] + ts(50, "leading")[-2:] == [981, 21, 1]
    assert [ts(n, "leading")[0] for n in (30, 40, 512)] == [958, 976, 512]
    assert ts(20, "trailing") == [999 - 50 * k for k in range(20)]
    assert ts(7, "trailing") == [999, 856, 713, 570, 428, 285, 142]
    assert ts(10, "linspace", "euler") == pytest.approx([111.0 * k for k in range(9, -1, -1)])
    assert ts(20, "linspace", "dpm++2m") == [
        999, 949, 899, 849, 799, 749, 699, 649, 599, 549, 500, 450, 400, 350, 300, 250, 200, 150,
        100, 50,
    ]  # fmt: skip
    assert ts(20, "leading", "dpm++2m")[:3] + ts(20, "leading", "unipc")[-2:] == [
        941, 894, 847, 95, 48,
    ]  # fmt: skip
    assert ts(20, None, "pndm")[:5] == [951, 901, 901, 851, 801]
    assert len(ts(20, None, "pndm")) == 21
    assert ts(4, None, "lcm") == [999, 759, 499, 259]
    assert ts(8, None, "lcm") == [999, 879, 759, 639, 499, 379, 259, 139]
    for sampler in ("euler", "dpm++2m", "ddim"):
        assert ts(10, "ays", sampler) == list(grids.AYS_TIMESTEPS)


def test_karras() -> None:
    plan = grids.timesteps(SCHEDULE, 10, "karras", sampler="euler")
    assert plan.sigmas == pytest.approx(
        [14.61464, 9.10293, 5.47839, 3.16860, 1.74942, 0.91407, 0.44692, 0.20140, 0.08191, 0.02917],
        abs=6e-6,
    )
    assert plan.timesteps == pytest.approx(
        [999, 916.28, 815.05, 687.15, 523.20, 327.15, 145.94, 40.86, 6.73, 0], abs=6e-3
    )
    whole = grids.timesteps(SCHEDULE, 10, "karras", sampler="dpm++2m")
    assert list(whole.timesteps) == [round(t) for t in plan.timesteps]
    assert whole.sigmas == pytest.approx(plan.sigmas)
    exact = grids.timesteps(SCHEDULE, 10, "karras", sampler="dpm++2m", fractional=True)
    assert exact.timesteps == pytest.approx(plan.timesteps)


def test_defaults_follow_the_model_then_the_sampler() -> None:
    assert ts(10, None, "ddim")[0] == 901
    assert ts(10, None, "dpm++2m")[0] == 999
    card = Schedule(SCHEDULE.alphas_cumprod, spacing="trailing", steps_offset=0)
    assert grids.timesteps(card, 10, sampler="ddim").timesteps[0] == 999
    assert grids.timesteps(card, 10, "leading", sampler="ddim").timesteps[0] == 900
    assert grids.timesteps(card, 4, sampler="lcm").timesteps[0] == 999


def test_starting_noise() -> None:
    """Only Euler and its kin scale unit noise, and not with leading steps."""
    sigma = SCHEDULE.sigma(999)
    for name in grids.FAMILIES:
        scale = grids.timesteps(SCHEDULE, 8, sampler=name).init_scale
        in_sigma = name in ("euler", "euler-a", "heun", "lms")
        assert scale == pytest.approx(sigma / (1 + sigma**2) ** 0.5 if in_sigma else 1)
    assert grids.timesteps(SCHEDULE, 8, "leading", sampler="euler").init_scale == 1
    over = grids.timesteps(SCHEDULE, 8, "karras", sampler="euler", base="leading")
    assert over.init_scale == 1
    assert over.sigmas[0] == pytest.approx(SCHEDULE.sigma(876))


def test_ddim_jumps_by_a_fixed_stride_unless_told_otherwise() -> None:
    plan = grids.timesteps(SCHEDULE, 20, "linspace", sampler="ddim")
    assert plan.targets[0] == SCHEDULE.sigma(949) != plan.sigmas[1] == SCHEDULE.sigma(946)
    chained = grids.timesteps(SCHEDULE, 20, "linspace", sampler="ddim", next_step=True)
    assert chained.targets[:-1] == chained.sigmas[1:]
    assert plan.targets[-1] == chained.targets[-1] == SCHEDULE.sigma(0)


def test_explicit_lists() -> None:
    plan = grids.timesteps(SCHEDULE, sampler="dpm++2m", explicit_timesteps=[999, 500, 100])
    assert plan.sigmas == pytest.approx([SCHEDULE.sigma(t) for t in (999, 500, 100)])
    assert plan.targets[-1] == 0
    assert plan.steps == len(plan) == 3
    by_sigma = grids.timesteps(SCHEDULE, sampler="euler", explicit_sigmas=[14.6, 3.0, 0.5, 0.0])
    assert by_sigma.sigmas == (14.6, 3.0, 0.5)
    assert by_sigma.targets == (3.0, 0.5, 0.0)
    assert by_sigma.timesteps[1] == pytest.approx(SCHEDULE.timestep(3.0))


@pytest.mark.parametrize(("value", "run"), [(0.8, 40), (0.29, 14), (1.0, 50), (0.02, 1)])
def test_strength(value: float, run: int) -> None:
    plan = grids.strength(SCHEDULE, 50, value, sampler="ddim")
    assert len(plan) == run
    assert plan.start_timestep == 1 + 20 * (run - 1)
    exact = grids.strength(SCHEDULE, 10, value, exact=True, sampler="euler")
    assert len(exact) == 10
    assert exact.init_scale == 1


def test_strength_that_leaves_nothing() -> None:
    for value in (0.019, 0.0, -1, 1.1, float("nan")):
        with pytest.raises(InvalidRequest, match="strength"):
            grids.strength(SCHEDULE, 50, value)
    with pytest.raises(InvalidRequest, match="no step"):
        grids.strength(SCHEDULE, 50, 0, exact=True)


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler", "lcm"])
def test_the_exact_rule_always_leaves_something(sampler: str) -> None:
    few = grids.strength(SCHEDULE, 50, 0.01, exact=True, sampler=sampler)
    assert 1 <= len(few) <= 5
    assert few.start_sigma < 0.2
    half = grids.strength(SCHEDULE, 8, 0.5, exact=True, sampler=sampler)
    assert len(half) == (4 if sampler == "lcm" else 8)
    assert 350 < half.start_timestep < 600


@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
@pytest.mark.parametrize("steps", [512, 700, 1000])
def test_more_than_half_the_timesteps_by_the_list(sampler: str, steps: int) -> None:
    plan = grids.timesteps(SCHEDULE, steps, "trailing", sampler=sampler, next_step=True)
    assert plan.timesteps[0] == 999
    levels = list(dict.fromkeys(plan.sigmas))
    assert len(levels) == steps
    assert plan.targets[-2] == plan.sigmas[-1]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((0,), {}),
        ((True,), {}),
        ((2.5,), {}),
        ((None,), {}),
        ((10, "karass"), {}),
        ((10,), {"sampler": "dpm2"}),
        ((10, "karras"), {"sampler": "pndm"}),
        ((10, "karras"), {"sampler": "lcm"}),
        ((60,), {"sampler": "lcm"}),
        ((1000, "leading"), {"sampler": "ddim"}),  # offset 1 would ask for timestep 1000
        ((2000, "linspace"), {"sampler": "dpm++2m"}),
        ((10,), {"final_sigma": "min"}),
        ((10,), {"explicit_timesteps": [1, 2]}),
        ((None,), {"explicit_timesteps": [1, 2]}),
        ((None,), {"explicit_timesteps": [1200, 2]}),
        ((None,), {"explicit_timesteps": []}),
        ((None,), {"explicit_sigmas": [0.0], "sampler": "euler"}),
    ],
)
def test_the_impossible_is_refused_by_name(arguments: tuple, options: dict) -> None:
    with pytest.raises(InvalidRequest):
        grids.timesteps(SCHEDULE, *arguments, **options)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 999), st.sampled_from(grids.SPACINGS), st.sampled_from(sorted(grids.FAMILIES))
)
def test_every_grid_is_sound(n: int, spacing: str, sampler: str) -> None:
    """Levels fall, timesteps stay in range, N means N; or the request is refused."""
    try:
        plan = grids.timesteps(SCHEDULE, n, spacing, sampler=sampler)
    except InvalidRequest:
        return
    assert len(plan) == n + (sampler == "pndm" and n > 1)
    assert min(plan.timesteps) >= 0
    assert max(plan.timesteps) <= 999
    assert np.all(np.diff(plan.sigmas) < 0) or sampler == "pndm"
    assert np.isfinite(plan.sigmas).all()
    assert all(t <= s for s, t in zip(plan.sigmas, plan.targets, strict=True))


def test_align_your_steps_is_the_authors() -> None:
    """Their lists, and their interpolation: log-linear over evenly spaced places."""
    assert list(grids.AYS_TIMESTEPS) == AysSchedules["StableDiffusionTimesteps"]
    published = [*AysSchedules["StableDiffusionSigmas"][:-1], SCHEDULE.sigma(0)]  # 0 ends a run
    ten = grids.timesteps(SCHEDULE, 10, "ays", sampler="dpm++2m")
    assert ten.sigmas == pytest.approx(published[:-1], rel=4e-3)  # printed to three places
    for steps in (4, 7, 15, 25):
        at = np.linspace(0, 1, steps + 1)[:-1]
        places = np.linspace(0, 1, len(published))
        expected = np.exp(np.interp(at, places, np.log(published)))
        found = grids.timesteps(SCHEDULE, steps, "ays", sampler="dpm++2m", fractional=True)
        assert found.sigmas == pytest.approx(expected, rel=6e-3)
        whole = grids.timesteps(SCHEDULE, steps, "ays", sampler="dpm++2m")
        assert list(whole.timesteps) == [round(t) for t in found.timesteps]


def test_fitted_steps_are_the_models_own() -> None:
    own = (999.0, 700.0, 300.0, 40.0)
    fitted = Schedule.from_spec(ScheduleSpec(fitted=own))
    for sampler in ("dpm++2m", "euler", "ddim", "unipc"):
        assert grids.timesteps(fitted, 4, "fitted", sampler=sampler).timesteps == own
    seven = grids.timesteps(fitted, 7, "fitted", sampler="dpm++2m", fractional=True)
    places = np.log([*(fitted.sigma(t) for t in own), fitted.sigma(0)])
    at = np.linspace(0, 4, 8)[:-1]
    assert seven.sigmas == pytest.approx(np.exp(np.interp(at, range(5), places)))
    with pytest.raises(InvalidRequest, match="nobody has fitted"):
        grids.timesteps(SCHEDULE, 4, "fitted", sampler="dpm++2m")
