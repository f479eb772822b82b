"""One table of names for everyone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from safelight import names
from safelight.errors import InvalidRequest


@pytest.mark.parametrize(
    ("name", "sampler", "schedule"),
    [
        ("dpm++2m", "dpm++2m", None),
        ("DPM++ 2M", "dpm++2m", None),
        ("DPM++ 2M Karras", "dpm++2m", "karras"),
        ("dpmpp_2m", "dpm++2m", None),
        ("k_dpmpp_2m_sde", "dpm++2m-sde", None),
        ("DPM++ 2M SDE Exponential", "dpm++2m-sde", "exponential"),
        ("DPM++ 3M SDE Karras", "dpm++3m-sde", "karras"),
        ("Euler a", "euler-a", None),
        ("euler_ancestral", "euler-a", None),
        ("K_EULER_ANCESTRAL", "euler-a", None),
        ("k_euler_a", "euler-a", None),
        ("k_euler", "euler", None),
        ("KLMS", "lms", None),
        ("LMS Karras", "lms", "karras"),
        ("LMSD", "lms", None),
        ("PLMS", "pndm", None),
        ("plms", "pndm", None),
        ("PNDM", "pndm", None),
        ("uni_pc_bh2", "unipc", None),
        ("HeunDiscrete", "heun", None),
        ("DPMSolverMultistep", "dpm++2m", None),
        ("DPMSolverMultistepScheduler", "dpm++2m", None),
        ("EulerAncestralDiscreteScheduler", "euler-a", None),
        ("  DDIM ", "ddim", None),
    ],
)
def test_sampler_spellings(name: str, sampler: str, schedule: str | None) -> None:
    choice = names.sampler(name)
    assert (choice.sampler, choice.schedule) == (sampler, schedule)


def test_a_name_may_carry_options() -> None:
    assert names.sampler("DPM++ 2M SDE Heun Karras") == names.Choice(
        "dpm++2m-sde", "karras", (("variant", "heun"),)
    )


@pytest.mark.parametrize("name", ["eulr", "DPM++ 2S a", "", "karras", "ddimm"])
def test_unknown_samplers_list_close_ones(name: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        names.sampler(name)
    assert "dpm++2m" in str(error.value)
    if name == "eulr":
        assert "Did you mean euler" in str(error.value)


def test_schedules() -> None:
    for name, short in [
        ("Karras", "karras"),
        ("SGM Uniform", "trailing"),
        ("Align Your Steps", "ays"),
        ("automatic", None),
        (None, None),
    ]:
        assert names.schedule(name) == short
    with pytest.raises(InvalidRequest, match="Did you mean karras"):
        names.schedule("karass")


def test_labels_go_there_and_back() -> None:
    for sampler in names.SAMPLERS:
        assert names.sampler(names.sampler_label(sampler.name)).sampler == sampler.name
        assert names.diffusers_class(sampler.name).endswith("Scheduler")
    for schedule in names.SCHEDULES:
        assert names.schedule(names.schedule_label(schedule.name)) == schedule.name


def test_the_table_is_the_solvers_table() -> None:
    from safelight.diffusion import grid, solvers

    short = {sampler.name for sampler in names.SAMPLERS}
    assert short == set(solvers.SOLVERS) == set(grid.FAMILIES)
    assert {schedule.name for schedule in names.SCHEDULES} == set(grid.SPACINGS)
    for sampler in names.SAMPLERS:
        for key, _ in names.sampler(sampler.label).options:
            assert key in solvers.SOLVERS[sampler.name].accepts


def test_no_torch() -> None:
    code = "import sys, safelight.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
