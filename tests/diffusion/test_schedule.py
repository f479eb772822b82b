"""Schedules and predictions against published numbers and their own algebra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safelight.diffusion import prediction
from safelight.diffusion import schedule as schedules
from safelight.diffusion.schedule import Schedule
from safelight.spec import ScheduleSpec

ABAR = {
    0: 0.99915, 1: 0.99829603, 10: 0.99043131, 100: 0.89422348, 200: 0.75369205, 250: 0.67379263,
    400: 0.42448302, 500: 0.27633268, 600: 0.16078257, 750: 0.05616985, 800: 0.03686962,
    900: 0.01415114, 961: 0.00728173, 981: 0.00577550, 999: 0.00466010,
}  # fmt: skip
SIGMA = {
    0: 0.029167, 1: 0.041314, 100: 0.343931, 250: 0.695799, 500: 1.618279, 750: 4.099164,
    900: 8.346597, 981: 13.120411, 999: 14.614641,
}  # fmt: skip
KINDS = ("epsilon", "v", "x0")


def test_published_values() -> None:
    schedule = Schedule.from_spec(ScheduleSpec())
    for t, value in ABAR.items():
        assert schedule.abar(t) == pytest.approx(value, abs=6e-9)
        assert schedule.alpha(t) == pytest.approx(math.sqrt(value), abs=1e-7)
    for t, value in SIGMA.items():
        assert schedule.sigma(t) == pytest.approx(value, abs=6e-7)
        assert schedule.lam(t) == pytest.approx(-math.log(value), abs=3e-5)


def test_squared_cosine() -> None:
    """unCLIP's noise augmentor and the prior: (sqrt ā, sqrt(1 - ā)) by level."""
    abar = schedules.alphas_cumprod(ScheduleSpec(kind="squared_cosine"))
    for level, (a, s) in {
        0: (0.9999794, 0.0064253),
        50: (0.99585, 0.09097),
        200: (0.94750, 0.31975),
        500: (0.70163, 0.71254),
        998: (0.0015585, 1.0),
        999: (4.93e-5, 1.0),
    }.items():
        assert math.sqrt(abar[level]) == pytest.approx(a, rel=1e-3 if level > 900 else 1e-5)
        assert math.sqrt(1 - abar[level]) == pytest.approx(s, abs=1e-5)


def test_zero_terminal_snr() -> None:
    schedule = Schedule.from_spec(ScheduleSpec(zero_terminal_snr=True, prediction_type="v"))
    assert schedule.abar(0) == pytest.approx(ABAR[0], abs=6e-9)
    assert schedule.abar(500) == pytest.approx(0.24101878, abs=1e-8)
    assert schedule.abar(900) == pytest.approx(0.00296039, abs=1e-8)
    assert schedule.abar(999) == 0
    assert math.isinf(schedule.sigma(999))
    assert schedule.sigma_table(finite=True)[-1] == pytest.approx(4096, rel=1e-6)


def test_trained_betas_and_linear() -> None:
    spec = ScheduleSpec(kind="linear", beta_start=1e-4, beta_end=0.02)
    linear = schedules.alphas_cumprod(spec)
    given_betas = tuple(schedules.betas(spec).tolist())
    assert torch.equal(linear, schedules.alphas_cumprod(ScheduleSpec(trained_betas=given_betas)))
    assert len(schedules.alphas_cumprod(ScheduleSpec(trained_betas=(0.1, 0.2)))) == 2


@given(st.floats(0, 999))
def test_levels_between_timesteps_go_there_and_back(t: float) -> None:
    schedule = Schedule.from_spec(ScheduleSpec())
    assert schedule.timestep(schedule.sigma(t)) == pytest.approx(t, abs=1e-6)
    batch = schedule.alpha_bar(torch.tensor([t], dtype=torch.float64))
    assert float(batch) == pytest.approx(schedule.abar(t), abs=1e-12)


def test_rates_are_exact_at_both_ends() -> None:
    assert schedules.rates(0.0) == (1.0, 0.0)
    assert schedules.rates(math.inf) == (0.0, 1.0)
    a, s = schedules.rates(14.6)
    assert a**2 + s**2 == pytest.approx(1, abs=1e-15)
    assert s / a == pytest.approx(14.6)


@pytest.mark.parametrize(
    "table", [torch.tensor([0.5]), torch.tensor([0.5, 0.6]), torch.tensor([1.5, 0.6])]
)
def test_nonsense_tables_are_refused(table: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="alphas_cumprod"):
        Schedule(table)


@given(st.floats(0.005, 0.995), st.sampled_from(KINDS))
def test_predictions_agree(abar: float, kind: str) -> None:
    """Any prediction of a known (x0, eps), read as any other, is the truth."""
    draws = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 3, generator=draws, dtype=torch.float64) for _ in range(2))
    for level in (abar, torch.tensor([abar, abar], dtype=torch.float64)):
        x = prediction.noised(x0, eps, level)
        said = prediction.target(kind, x0, eps, level)
        for read, truth in [
            (prediction.to_x0, x0),
            (prediction.to_eps, eps),
            (prediction.to_v, prediction.target("v", x0, eps, level)),
        ]:
            assert torch.allclose(read(said, x, level, kind), truth, atol=1e-10)


def test_half_precision_is_widened_and_kinds_are_checked() -> None:
    x = torch.ones(1, 2, dtype=torch.float16)
    assert prediction.to_x0(x, x, 0.5, "v").dtype == torch.float32
    with pytest.raises(ValueError, match="prediction_type"):
        prediction.to_eps(x, x, 0.5, "flow")
    with pytest.raises(ValueError, match="prediction_type"):
        Schedule(torch.tensor([0.9, 0.5]), "v_prediction")
