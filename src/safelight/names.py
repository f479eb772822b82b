"""Sampler and schedule names with all their aliases. No torch.

The command line, the server, PNG text and published ``scheduler_config.json`` files all read this
table. Matching ignores case, spaces, dashes, underscores and a ``k_`` prefix, and reads ``pp`` as
``++``. A1111 used to write the schedule behind the sampler ("DPM++ 2M Karras"): that is understood
too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from safelight.errors import InvalidRequest

DEFAULT_MODEL = "tiny-v"
"""What is loaded where no model is named: the shipped one that scores best."""


@dataclass(frozen=True)
class Sampler:
    """One sampler and what others call it.

    Args:
        name: the short name; :data:`safelight.diffusion.solvers.SOLVERS` has an entry for each.
        label: A1111's name, written into PNG text.
        diffusers: class name of the reference scheduler.
        aliases: other spellings.
    """

    name: str
    label: str
    diffusers: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """One timestep spacing; ``label`` is A1111's schedule type ("" where it has none)."""

    name: str
    label: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What a sampler name asks for.

    Args:
        sampler: the short name.
        schedule: the schedule that the name carried ("DPM++ 2M Karras"), or None.
        options: solver options that the name implies ("DPM++ 2M SDE Heun").
    """

    sampler: str
    schedule: str | None = None
    options: tuple[tuple[str, str], ...] = ()


_DPM = "DPMSolverMultistepScheduler"
SAMPLERS: tuple[Sampler, ...] = (
    Sampler("ddim", "DDIM", "DDIMScheduler"),
    Sampler("pndm", "PLMS", "PNDMScheduler"),
    Sampler("dpm++2m", "DPM++ 2M", _DPM, ("sample_dpmpp_2m", "DPMSolver++", "dpm++")),
    Sampler("dpm++2m-sde", "DPM++ 2M SDE", _DPM, ("sample_dpmpp_2m_sde",)),
    Sampler("dpm++3m", "DPM++ 3M", _DPM),
    Sampler("dpm++3m-sde", "DPM++ 3M SDE", _DPM, ("sample_dpmpp_3m_sde",)),
    Sampler("euler", "Euler", "EulerDiscreteScheduler", ("sample_euler",)),
    Sampler(
        "euler-a",
        "Euler a",
        "EulerAncestralDiscreteScheduler",
        ("euler_ancestral", "sample_euler_ancestral"),
    ),
    Sampler("heun", "Heun", "HeunDiscreteScheduler", ("sample_heun",)),
    Sampler("lms", "LMS", "LMSDiscreteScheduler", ("sample_lms", "LMSD")),
    Sampler("unipc", "UniPC", "UniPCMultistepScheduler"),
    Sampler("lcm", "LCM", "LCMScheduler"),
    Sampler("ddpm", "DDPM", "DDPMScheduler"),
)
SCHEDULES: tuple[Schedule, ...] = (
    Schedule("leading"),
    Schedule("trailing", "SGM Uniform"),
    Schedule("linspace", "Uniform"),
    Schedule("karras", "Karras", ("use_karras_sigmas",)),
    Schedule("exponential", "Exponential", ("use_exponential_sigmas",)),
    Schedule("ays", "Align Your Steps", ("align_your_steps_sd15",)),
    Schedule("fitted", "", ("gits",)),
)
_AUTOMATIC = ("", "auto", "automatic", "default", "none")


def _key(name: str) -> str:
    key = re.sub(r"[\s_-]+", "", name.lower()).replace("++", "pp")
    return key


def _samplers() -> dict[str, Choice]:
    table: dict[str, Choice] = {}
    for sampler in SAMPLERS:
        choice = Choice(sampler.name)
        spellings = [sampler.name, sampler.label, *sampler.aliases]
        if sampler.diffusers != _DPM or sampler.name == "dpm++2m":
            spellings += [sampler.diffusers, sampler.diffusers.removesuffix("Scheduler")]
        for spelling in spellings:
            table[_key(spelling)] = choice
            table["k" + _key(spelling)] = choice
    table["plms"] = Choice("pndm")
    heun = (("variant", "heun"),)
    table[_key("DPM++ 2M SDE Heun")] = Choice("dpm++2m-sde", options=heun)
    table[_key("DPM++ 2M Heun")] = Choice("dpm++2m", options=heun)
    table[_key("uni_pc_bh1")] = Choice("unipc", options=(("variant", "bh1"),))
    table[_key("uni_pc_bh2")] = Choice("unipc")
    return table


def _schedules() -> dict[str, str]:
    return {
        _key(spelling): schedule.name
        for schedule in SCHEDULES
        for spelling in (schedule.name, schedule.label, *schedule.aliases)
        if spelling
    }


_SAMPLERS = _samplers()
_SCHEDULES = _schedules()


def sampler(name: str) -> Choice:
    """What a sampler's name, in any of its spellings, asks for.

    Raises:
        InvalidRequest: unknown; the message lists close matches.
    """
    if not isinstance(name, str):
        raise InvalidRequest("sampler", f"must be a name, not {name!r}.")
    key = _key(name)
    if key in _SAMPLERS:
        return _SAMPLERS[key]
    for spelling, schedule_name in _SCHEDULES.items():
        if key.endswith(spelling) and key.removesuffix(spelling) in _SAMPLERS:
            plain = _SAMPLERS[key.removesuffix(spelling)]
            return Choice(plain.sampler, schedule_name, plain.options)
    raise InvalidRequest(
        "sampler",
        f"no sampler is called {name!r}.",
        _hint(key, _SAMPLERS, (s.name for s in SAMPLERS)),
    )


def schedule(name: str | None) -> str | None:
    """The short name of a schedule in any of its spellings; None for "automatic".

    Raises:
        InvalidRequest: unknown; the message lists close matches.
    """
    if name is None or _key(name) in _AUTOMATIC:
        return None
    if _key(name) in _SCHEDULES:
        return _SCHEDULES[_key(name)]
    raise InvalidRequest(
        "schedule",
        f"no schedule is called {name!r}.",
        _hint(_key(name), _SCHEDULES, (s.name for s in SCHEDULES)),
    )


def _hint(key: str, table: dict[str, Choice] | dict[str, str], names: Iterable[str]) -> str:
    found = [table[match] for match in get_close_matches(key, table, n=5, cutoff=0.5)]
    close = dict.fromkeys(f.sampler if isinstance(f, Choice) else f for f in found)
    if close:
        return f"Did you mean {' or '.join(close)}? All: {' '.join(names)}"
    return f"One of {' '.join(names)}"


def sampler_label(name: str) -> str:
    """A1111's name of a sampler, for PNG text: ``dpm++2m`` gives "DPM++ 2M"."""
    short = sampler(name).sampler
    return next(s.label for s in SAMPLERS if s.name == short)


def schedule_label(name: str | None) -> str:
    """A1111's schedule type; "Automatic" for None, the plain name where A1111 has no such type."""
    short = schedule(name)
    if short is None:
        return "Automatic"
    return next(s.label or s.name.capitalize() for s in SCHEDULES if s.name == short)


def diffusers_class(name: str) -> str:
    """The reference's scheduler class for a sampler, as written into an exported folder."""
    short = sampler(name).sampler
    return next(s.diffusers for s in SAMPLERS if s.name == short)
