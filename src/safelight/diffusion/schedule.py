"""Noise schedules: how much of the picture is left at each training timestep.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (linear betas); Rombach et al. 2022,
latent diffusion (betas linear in their square root); Nichol & Dhariwal 2021 (squared cosine),
Eq. 17; Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
Algorithm 1 (zero terminal SNR).

Tables are float64: the reference computes them in float32, whose sigmas differ by up to 1.3e-5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from safelight.spec import ScheduleSpec

FINITE_FLOOR = 2.0**-24
"""ā that solvers in sigma space put in place of 0 (sigma 4096), as the reference does."""


def betas(spec: ScheduleSpec) -> Tensor:
    """Variance added at each training step, before any zero-terminal-SNR rescale.

    Returns:
        float64, shape ``[steps]``.
    """
    n = len(spec.trained_betas) if spec.trained_betas is not None else spec.steps
    if spec.trained_betas is not None:
        return torch.tensor(spec.trained_betas, dtype=torch.float64)
    if spec.kind == "linear":
        return torch.linspace(spec.beta_start, spec.beta_end, n, dtype=torch.float64)
    if spec.kind == "scaled_linear":  # LDM's yaml calls this one "linear"
        root = torch.linspace(spec.beta_start**0.5, spec.beta_end**0.5, n, dtype=torch.float64)
        return root**2
    # Squared cosine (Nichol & Dhariwal, Eq. 17); beta_start and beta_end play no part.
    u = torch.arange(n + 1, dtype=torch.float64) / n
    abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


def rescale_zero_terminal_snr(abar: Tensor) -> Tensor:
    """Shift and scale ``sqrt(abar)`` so that the last step holds noise only.

    Lin et al. 2024, Algorithm 1. Keeps the first entry. Needs v- or x0-prediction and a grid that
    starts at the last timestep (``trailing`` or ``linspace``).

    Args:
        abar: shape ``[T]``, decreasing.

    Returns:
        shape ``[T]``, with ``abar[-1] == 0``.
    """
    s = abar.sqrt()
    return ((s - s[-1]) * (s[0] / (s[0] - s[-1]))) ** 2


def alphas_cumprod(spec: ScheduleSpec, dtype: torch.dtype = torch.float64) -> Tensor:
    """ā at each training timestep, shape ``[T]``, on the CPU. Computed in float64, then cast."""
    abar = torch.cumprod(1 - betas(spec), dim=0)
    if spec.zero_terminal_snr:
        abar = rescale_zero_terminal_snr(abar)
    return abar.to(dtype)


def sigmas(abar: Tensor) -> Tensor:
    """``sqrt((1 - ā) / ā)``, k-diffusion's noise level; infinite where ā is 0."""
    return ((1 - abar) / abar).sqrt()


def rates(sigma: float) -> tuple[float, float]:
    """``(sqrt(ā), sqrt(1 - ā))`` of a noise level; exact at 0 and at infinity."""
    if sigma == 0:
        return 1.0, 0.0
    return 1 / math.hypot(1, sigma), 1 / math.hypot(1, 1 / sigma)


@dataclass(frozen=True, eq=False)
class Schedule:
    """A table of ā, and what the model that was trained on it predicts.

    Scalars in are timesteps (fractions allowed), scalars out are Python floats: solvers keep all
    their coefficients in float64 and touch tensors only to apply them.

    Args:
        alphas_cumprod: shape ``[T]``, decreasing, each in [0, 1]. Kept as float64 on the CPU. Give
            a reference's own float32 table to compare arithmetic and nothing else.
        prediction_type: ``epsilon``, ``v`` or ``x0``.
        final_alpha_one: the level after the last step is ā = 1 instead of ā[0]
            (``set_alpha_to_one``; DDIM and PNDM only).
        steps_offset: added by the ``leading`` spacing.
        spacing: the model's own spacing; None leaves it to the sampler.
        fitted: timesteps found for this model, for the spacing ``fitted``.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"
    final_alpha_one: bool = False
    steps_offset: int = 1
    spacing: str | None = None
    fitted: tuple[float, ...] = ()
    _sigma: np.ndarray = field(init=False, repr=False)
    _cache: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        table = self.alphas_cumprod.detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"alphas_cumprod must be one row of values, not {tuple(table.shape)}")
        if not bool(((table >= 0) & (table <= 1)).all()) or bool((table.diff() >= 0).any()):
            raise ValueError("alphas_cumprod must decrease and stay within [0, 1]")
        if self.prediction_type not in ("epsilon", "v", "x0"):
            raise ValueError(f"prediction_type {self.prediction_type!r}: epsilon, v or x0")
        object.__setattr__(self, "alphas_cumprod", table)
        with np.errstate(divide="ignore"):
            object.__setattr__(self, "_sigma", sigmas(table).numpy())

    @classmethod
    def from_spec(cls, spec: ScheduleSpec) -> Schedule:
        """The schedule that a model's record describes."""
        return cls(
            alphas_cumprod(spec),
            spec.prediction_type,
            spec.final_alpha_one,
            spec.steps_offset,
            spec.spacing,
            spec.fitted,
        )

    @property
    def steps(self) -> int:
        """T, the number of training timesteps."""
        return len(self._sigma)

    def sigma_table(self, *, finite: bool = False) -> np.ndarray:
        """sigma at every training timestep, float64 ``[T]``, increasing.

        ``finite``: ā = 0 is read as 2^-24, as the reference's solvers in sigma space do.
        """
        if finite and np.isinf(self._sigma[-1]):
            table = self._sigma.copy()
            table[-1] = math.sqrt((1 - FINITE_FLOOR) / FINITE_FLOOR)
            return table
        return self._sigma

    def sigma(self, t: float) -> float:
        """Noise level at timestep ``t``; between two timesteps, interpolated in log sigma."""
        if not 0 <= t <= self.steps - 1:
            raise ValueError(f"timestep {t} is outside 0..{self.steps - 1}")
        low = min(int(t), self.steps - 2)
        if t == low:
            return float(self._sigma[low])
        if t == low + 1:
            return float(self._sigma[low + 1])
        a, b = self.sigma_table(finite=True)[low : low + 2]
        return math.exp(math.log(a) + (t - low) * math.log(b / a))

    def timestep(self, sigma: float) -> float:
        """The (fractional) timestep of a noise level, by log-sigma interpolation, clamped."""
        table = self.sigma_table(finite=True)
        log = math.log(max(sigma, 1e-10))
        return float(np.interp(log, np.log(table), np.arange(len(table))))

    def abar(self, t: float) -> float:
        """ā at timestep ``t``, a float."""
        if t == int(t) and 0 <= t < self.steps:
            return float(self.alphas_cumprod[int(t)])
        return rates(self.sigma(t))[0] ** 2

    def alpha(self, t: float) -> float:
        """``sqrt(ā)``, the share of picture at timestep ``t``."""
        return math.sqrt(self.abar(t))

    def lam(self, t: float) -> float:
        """Half the log signal-to-noise ratio, ``log(sqrt(ā) / sqrt(1 - ā)) = -log sigma``."""
        return -math.log(self.sigma(t))

    def alpha_bar(self, t: Tensor) -> Tensor:
        """ā for a batch of timesteps, for training.

        Args:
            t: shape ``[B]``, integer, or floating (interpolated in log sigma).

        Returns:
            shape ``[B]`` on ``t``'s device, float64 where the device has it, else float32.
        """
        dtype = torch.float32 if t.device.type == "mps" else torch.float64
        key = (t.device, dtype)
        table = self._cache.get(key)
        if table is None:
            table = self._cache[key] = self.alphas_cumprod.to(t.device, dtype)
        if not t.is_floating_point():
            return table[t]
        t = t.to(dtype)
        low = t.floor().clamp(0, self.steps - 2).long()
        log = ((1 - table[low]) / table[low].clamp(min=FINITE_FLOOR)).log()
        log_next = ((1 - table[low + 1]) / table[low + 1].clamp(min=FINITE_FLOOR)).log()
        interpolated = 1 / (1 + (log + (t - low) * (log_next - log)).exp())
        # On the table itself, the table's own value (ā = 0 included).
        return torch.where(t == low, table[low], interpolated).where(t != low + 1, table[low + 1])
