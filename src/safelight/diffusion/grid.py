"""Which noise levels a sampler visits, and what timestep it tells the network at each.

Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", Table 2 (leading,
linspace, trailing); Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based
Generative Models", Eq. 5 (karras); Sabour et al. 2024, "Align Your Steps" (ays).

The reference's samplers do not agree on what "20 steps" means. A *family* is a group that does:

* ``table``: DDIM, DDPM. Integer timesteps; DDIM jumps by ``T // N`` whatever comes next.
* ``pndm``: the same list with its second entry twice, one network call each.
* ``lcm``: a subset of the grid that the student was distilled on.
* ``multistep``: DPM-Solver++ and UniPC. A grid of N + 1 timesteps without its last.
* ``sigma``: Euler, Heun, LMS. Fractional timesteps; sigma interpolated linearly in the table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from safelight.diffusion.schedule import Schedule, rates
from safelight.errors import InvalidRequest

Family = Literal["table", "pndm", "lcm", "multistep", "sigma"]

FAMILIES: dict[str, Family] = {
    "ddim": "table",
    "ddpm": "table",
    "pndm": "pndm",
    "lcm": "lcm",
    "dpm++2m": "multistep",
    "dpm++2m-sde": "multistep",
    "dpm++3m": "multistep",
    "dpm++3m-sde": "multistep",
    "unipc": "multistep",
    "euler": "sigma",
    "euler-a": "sigma",
    "heun": "sigma",
    "lms": "sigma",
}
UNIFORM = ("leading", "trailing", "linspace")
SPACINGS = (*UNIFORM, "karras", "exponential", "ays", "fitted")
DEFAULT_SPACING: dict[Family, str] = {
    "table": "leading",
    "pndm": "leading",
    "lcm": "leading",
    "multistep": "linspace",
    "sigma": "linspace",
}
AYS_TIMESTEPS = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)
"""Sabour et al. 2024, the ten steps found for SD 1.5."""
KARRAS_RHO = 7.0


@dataclass(frozen=True)
class Grid:
    """The plan of a run: one entry for each step (for PNDM, for each network call).

    Args:
        timesteps: what the network is told.
        sigmas: the noise level of the latents there, ``sqrt((1 - ā) / ā)``.
        targets: the level that the step ends on. ``targets[i] == sigmas[i + 1]`` but for the quirks
            of DDIM and PNDM.
        steps: N, as asked for.
        family: the samplers it was made for.
        stride: ``T // N`` (PNDM).
        init_scale: what the caller's start is multiplied by to become VP latents: 1, but for
            Euler and its kin on unit noise.
        begin: first entry that is run; above 0 for image-to-image.
        listed: PNDM goes to the next listed timestep, as its targets say, instead of by ``stride``.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    targets: tuple[float, ...]
    steps: int
    family: Family
    stride: int = 1
    init_scale: float = 1.0
    begin: int = 0
    listed: bool = False

    def __len__(self) -> int:
        """Entries left to run."""
        return len(self.timesteps) - self.begin

    @property
    def start_sigma(self) -> float:
        """The noise level that an image must be brought to before the run."""
        return self.sigmas[self.begin]

    @property
    def start_timestep(self) -> float:
        """The timestep of :attr:`start_sigma`."""
        return self.timesteps[self.begin]

    def start_at(self, begin: int) -> Grid:
        """The same plan from entry ``begin``, on a noised image (``init_scale`` 1)."""
        if not 0 <= begin < len(self.timesteps):
            raise InvalidRequest(
                "strength", f"leaves none of the {self.steps} steps.", "Raise it, or the steps."
            )
        return dataclasses.replace(self, begin=begin, init_scale=1.0)


def timesteps(
    schedule: Schedule,
    n: int | None = None,
    spacing: str | None = None,
    *,
    sampler: str = "ddim",
    steps_offset: int | None = None,
    base: str | None = None,
    final_sigma: Literal["zero", "min"] | None = None,
    next_step: bool = False,
    fractional: bool = False,
    lcm_steps: int = 50,
    lcm_strength: float = 1.0,
    explicit_timesteps: Sequence[float] | None = None,
    explicit_sigmas: Sequence[float] | None = None,
) -> Grid:
    """The grid of ``n`` steps, by the conventions of ``sampler``'s reference implementation.

    Args:
        n: number of steps; not with an explicit list.
        spacing: ``leading``, ``trailing``, ``linspace``, ``karras``, ``exponential``, ``ays``, or
            ``fitted`` where the schedule has steps of its own.
            None: the schedule's own, else the sampler's default.
        sampler: a short name of :data:`FAMILIES`.
        steps_offset: added by ``leading``; None: the schedule's.
        base: for levels that are not evenly spaced, in the ``sigma`` family: the even spacing whose
            first and last sigma are the range, and whose convention scales the first noise. None:
            the schedule's own, else ``linspace``. (The multistep family takes the whole table.)
        final_sigma: level after the last step (``multistep`` and ``sigma`` families): ``zero``,
            the default, or ``min``, the schedule's smallest.
        next_step: DDIM and PNDM go to the next listed timestep instead of the reference's
            ``t - T//N``.
        fractional: the multistep family tells the network the exact fractional timestep of a karras
            or exponential level, where the reference tells it a whole number.
        lcm_steps, lcm_strength: the grid a consistency model was distilled on, and the share of it
            that is used (image-to-image of the reference's LCM pipelines).
        explicit_timesteps: descending, in 0..T-1, instead of ``n``.
        explicit_sigmas: descending, instead of ``n``; a last 0 is the end of the run, else
            ``final_sigma`` is.

    Raises:
        InvalidRequest: an impossible number, an unknown name, or a spacing this sampler lacks.
    """
    if sampler not in FAMILIES:
        raise InvalidRequest("sampler", f"no grid for {sampler!r}.", f"One of {' '.join(FAMILIES)}")
    family = FAMILIES[sampler]
    explicit = explicit_timesteps is not None or explicit_sigmas is not None
    _check(n, spacing, family, final_sigma, explicit_timesteps, explicit_sigmas)
    if spacing is None and family != "lcm":
        spacing = schedule.spacing
    spacing = spacing or DEFAULT_SPACING[family]
    if spacing in UNIFORM and not (explicit and base):
        base = spacing
    base = base or schedule.spacing or "linspace"
    if base not in UNIFORM:
        raise InvalidRequest("schedule", f"base {base!r} is not even.", " ".join(UNIFORM))
    offset = schedule.steps_offset if steps_offset is None else steps_offset
    table = schedule.sigma_table(finite=family in ("multistep", "sigma"))
    end = float(table[0]) if final_sigma == "min" else 0.0

    if explicit_sigmas is not None:
        levels = np.asarray([float(s) for s in explicit_sigmas])
        if levels[-1] == 0:
            levels, end = levels[:-1], 0.0
        ts = np.asarray([schedule.timestep(s) for s in levels])
    elif explicit_timesteps is not None:
        ts = np.asarray([float(t) for t in explicit_timesteps])
        levels = _levels(ts, schedule, table, family)
    elif family == "lcm":
        ts = _lcm(n or 0, schedule.steps, lcm_steps, lcm_strength)
        levels = _levels(ts, schedule, table, family)
    elif spacing in UNIFORM:
        ts = _uniform(n or 0, schedule.steps, spacing, offset, family)
        levels = _levels(ts, schedule, table, family)
    elif spacing in ("ays", "fitted"):
        knots = AYS_TIMESTEPS if spacing == "ays" else schedule.fitted
        ts, levels = _placed(knots, n or 0, schedule, table, family, whole=not fractional)
    else:
        high, low = table[-1], table[0]
        if family != "multistep":
            ends = _uniform(n or 0, schedule.steps, base, offset, family)[[0, -1]]
            high, low = _levels(ends, schedule, table, family)
        make = _karras if spacing == "karras" else _exponential
        levels = make(n or 0, float(high), float(low))
        ts = np.asarray([schedule.timestep(s) for s in levels])
        if family == "multistep" and not fractional:
            # The network is told a whole number, the solver keeps the exact level.
            ts = np.round(ts)
    _sound(levels, schedule)

    stride = schedule.steps // (n or len(ts))
    targets = np.append(levels[1:], end)
    if family in ("table", "pndm"):
        last = 0.0 if schedule.final_alpha_one or sampler == "ddpm" else table[0]
        targets[-1] = last
        even = spacing in UNIFORM and not explicit
        if not next_step and (family == "pndm" or (sampler == "ddim" and even)):
            before = (ts - stride).astype(int)
            targets = np.where(before >= 0, table[before], last)
    if family == "pndm" and len(ts) > 1:
        twice = [0, 1, *range(1, len(ts))]
        ts, levels, targets = ts[twice], levels[twice], targets[twice]
    first = float(levels[0])
    return Grid(
        timesteps=tuple(float(t) for t in ts),
        sigmas=tuple(float(s) for s in levels),
        targets=tuple(float(s) for s in targets),
        steps=n or len(ts),
        family=family,
        stride=stride,
        # Noise of standard deviation sigma, as the reference starts Euler and its kin (but for
        # leading), is sqrt(1 - ā) in VP scale: the little picture that belongs there is left out.
        init_scale=rates(first)[1] if family == "sigma" and base != "leading" else 1.0,
        listed=next_step,
    )


def strength(
    schedule: Schedule,
    n: int,
    value: float,
    spacing: str | None = None,
    *,
    exact: bool = False,
    **options: Any,
) -> Grid:
    """The grid for image-to-image: start from a noised image instead of noise.

    The reference's rule runs the last ``int(n * value)`` of ``n`` steps. ``exact`` runs exactly
    ``n`` steps, the last of ``round(n / value)``; where that would be more than half of the
    schedule's timesteps, the last share ``value`` of so many, one at least.

    Args:
        value: 0..1; 1 hardly keeps anything of the image.
        options: those of :func:`timesteps`.

    Returns:
        a grid whose :attr:`~Grid.start_sigma` is the level to noise the image to
        (:func:`safelight.diffusion.solvers.add_noise`).

    Raises:
        InvalidRequest: ``value`` outside 0..1, or so small that no step is left.
    """
    if not 0 <= value <= 1:
        raise InvalidRequest("strength", f"must be within 0 and 1, not {value}.")
    if not exact:
        run = min(int(n * value), n)
        if run < 1:
            raise InvalidRequest(
                "strength", f"{value} of {n} steps leaves none to run.", "Raise either."
            )
        return timesteps(schedule, n, spacing, **options).start_at(n - run)
    if value == 0:
        raise InvalidRequest("strength", "0 leaves no step to run.", "Raise it.")
    sampler = options.get("sampler", "ddim")
    total, run = exact_run(schedule.steps, n, value, sampler)
    grid = timesteps(schedule, total, spacing, **options)
    begin = total - run
    if FAMILIES[sampler] == "pndm" and begin > 0:
        begin += 1  # the grid has its second entry twice
    return grid.start_at(begin)


def exact_run(levels: int, n: int, value: float, sampler: str) -> tuple[int, int]:
    """Steps of the whole grid, and how many of its last are run: the exact rule of strength.

    Args:
        levels: the schedule's timesteps.
    """
    most = levels // 2
    if FAMILIES[sampler] == "lcm":  # its grid cannot be made finer
        return n, max(1, round(n * value))
    if (total := round(n / value)) <= most or total == n:
        return total, n
    total = max(n, most)
    return total, max(1, round(total * value))


def coverage(levels: int, n: int, sampler: str) -> float:
    """Share of the schedule that ``n`` leading steps span. The reference's whole-number stride
    leaves some of it out at the top: 3 % of it at 30 steps, half of it at 501."""
    stride = levels // (n + 1 if FAMILIES[sampler] == "multistep" else n)
    return n * stride / levels


def _check(
    n: int | None,
    spacing: str | None,
    family: Family,
    final_sigma: str | None,
    explicit_timesteps: Sequence[float] | None,
    explicit_sigmas: Sequence[float] | None,
) -> None:
    """Refuse what cannot be honoured, before any arithmetic."""
    lists = [x for x in (explicit_timesteps, explicit_sigmas) if x is not None]
    if len(lists) + (n is not None) != 1:
        raise InvalidRequest("steps", "give a number of steps or one explicit list.")
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise InvalidRequest("steps", f"must be a whole number above 0, not {n!r}.")
    if lists and (len(lists[0]) == 0 or list(lists[0]) == [0]):
        raise InvalidRequest("steps", "the explicit list is empty.")
    if spacing is not None and spacing not in SPACINGS:
        raise InvalidRequest("schedule", f"no spacing {spacing!r}.", f"One of {' '.join(SPACINGS)}")
    if final_sigma not in (None, "zero", "min"):
        raise InvalidRequest("final_sigma", f"{final_sigma!r} is neither zero nor min.")
    if final_sigma is not None and family not in ("multistep", "sigma"):
        raise InvalidRequest("final_sigma", f"the {family} samplers have no such choice.")
    if family == "lcm" and (spacing not in (None, "leading") or explicit_sigmas is not None):
        raise InvalidRequest("schedule", "lcm has a grid of its own.", "Leave the schedule out.")
    if family == "pndm" and (lists or spacing not in (None, *UNIFORM)):
        raise InvalidRequest(
            "schedule", "pndm needs evenly spaced steps.", f"One of {' '.join(UNIFORM)}"
        )


def _sound(levels: np.ndarray, schedule: Schedule) -> None:
    if np.any(np.diff(levels) >= 0):
        raise InvalidRequest(
            "steps",
            f"{len(levels)} steps visit the same noise level twice, or go back up.",
            f"The model has {schedule.steps} levels; list timesteps and sigmas in falling order.",
        )
    if levels[-1] <= 0 or np.isnan(levels[0]):
        raise InvalidRequest("steps", "every noise level must be above 0.")
    if np.isinf(levels[0]) and schedule.prediction_type == "epsilon":
        raise InvalidRequest(
            "schedule",
            "the first step holds noise only, where an epsilon prediction says nothing.",
            "Use a v-prediction model, or a spacing that starts below the last timestep.",
        )


def _uniform(n: int, total: int, spacing: str, offset: int, family: Family) -> np.ndarray:
    """Lin et al. 2024, Table 2, as each family of the reference writes it. Descending."""
    if spacing == "trailing":
        # Cut to n: for 62 values of n up to 1000 (61, 103 ...) rounding gives the reference one
        # step more, at timestep -1.
        return np.round(np.arange(total, 0, -total / n))[:n] - 1
    if spacing == "linspace":
        if family == "sigma":
            return np.linspace(0, total - 1, n)[::-1]
        if family == "multistep":
            return np.linspace(0, total - 1, n + 1).round()[::-1][:-1]
        return np.linspace(0, total - 1, n).round()[::-1]
    if family == "multistep":
        return np.arange(1, n + 1)[::-1] * float(total // (n + 1)) + offset
    return np.arange(n)[::-1] * float(total // n) + offset


def _levels(ts: np.ndarray, schedule: Schedule, table: np.ndarray, family: Family) -> np.ndarray:
    """Sigma at each timestep: the table's, between entries as the family interpolates."""
    if len(ts) and (ts.min() < 0 or ts.max() > schedule.steps - 1):
        raise InvalidRequest(
            "steps",
            f"timesteps {ts.min():g} to {ts.max():g} leave 0..{schedule.steps - 1}.",
            "Ask for fewer steps, or another spacing.",
        )
    if family == "sigma":
        return np.interp(ts, np.arange(len(table)), table)
    whole = ts == np.round(ts)
    return np.asarray(
        [table[int(t)] if w else schedule.sigma(t) for t, w in zip(ts, whole, strict=True)]
    )


def _karras(n: int, high: float, low: float) -> np.ndarray:
    """Karras et al. 2022, Eq. 5, without the final 0."""
    ramp = np.linspace(0, 1, n)
    return (high ** (1 / KARRAS_RHO) * (1 - ramp) + low ** (1 / KARRAS_RHO) * ramp) ** KARRAS_RHO


def _exponential(n: int, high: float, low: float) -> np.ndarray:
    """Evenly spaced in log sigma."""
    return np.exp(np.linspace(math.log(high), math.log(low), n))


def _placed(
    found: tuple[float, ...],
    n: int,
    schedule: Schedule,
    table: np.ndarray,
    family: Family,
    *,
    whole: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Steps that were found; for other counts, interpolated in log sigma as AYS's authors do."""
    if not found:
        raise InvalidRequest("schedule", "nobody has fitted steps to this model.", "Use ays.")
    if found is AYS_TIMESTEPS and schedule.steps != 1000:
        raise InvalidRequest("schedule", "ays is known for models of 1000 timesteps only.")
    ts = np.asarray(found, dtype=float)
    if n != len(ts):
        knots = np.log([*table[ts.astype(int)], table[0]])
        at = np.linspace(0, len(ts), n + 1)[:-1]
        ts = np.asarray(
            [schedule.timestep(math.exp(v)) for v in np.interp(at, np.arange(len(knots)), knots)]
        )
        if whole and family != "sigma":
            ts = np.round(ts)
    return ts, _levels(ts, schedule, table, family)


def _lcm(n: int, total: int, original: int, share: float) -> np.ndarray:
    """Luo et al. 2023, Latent Consistency Models: n of the ``original`` distilled timesteps."""
    grid = np.arange(1, int(original * share) + 1)[::-1] * (total // original) - 1
    if n > len(grid):
        raise InvalidRequest(
            "steps", f"{n} is more than the {len(grid)} timesteps lcm was distilled on."
        )
    return grid[np.floor(np.linspace(0, len(grid), n, endpoint=False)).astype(int)].astype(float)
