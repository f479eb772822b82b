"""Guidance as a program: for each step, which conditionings to ask about and how to add them.

Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", Eq. 6; Liu et al. 2022, "Compositional
Visual Generation with Composable Diffusion Models", Eq. 11; Kynkäänniemi et al. 2024, "Applying
Guidance in a Limited Interval Improves Sample and Distribution Quality", Eq. 6; Lin et al. 2024,
Section 3.4 (rescale).

A *branch* is one conditioning of a request. By the field's custom 0 is the unconditional (or
negative) one and 1 the prompt. A program gives each step a short list of (branch, weight): the
driver evaluates those branches, in one batch, and takes the weighted sum. No guidance is one branch
of weight 1; an interval is a program that changes its mind; prompt editing is one that names other
branches at other steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.diffusion.prediction import working

UNCONDITIONAL, CONDITIONAL = 0, 1


@dataclass(frozen=True, slots=True)
class Step:
    """Where a run is, for a program to decide by: fields of the solver's question."""

    index: int
    total: int
    timestep: float
    sigma: float

    @property
    def progress(self) -> float:
        """0 at the first call, towards 1 at the last."""
        return self.index / self.total


Branches = tuple[tuple[int, float], ...]
Program = Callable[[Step], Branches]


def plain(branch: int = CONDITIONAL) -> Program:
    """One branch, as it is."""
    return lambda step: ((branch, 1.0),)


def classifier_free(
    scale: float, *, unconditional: int = UNCONDITIONAL, conditional: int = CONDITIONAL
) -> Program:
    """``u + scale (c - u)``. At a scale of 1 or less there is no guidance: one branch, as the
    reference has it."""
    if not math.isfinite(scale):
        raise ValueError(f"guidance scale must be finite, not {scale}")
    if scale <= 1:
        return plain(conditional)
    return lambda step: ((unconditional, 1 - scale), (conditional, scale))


def composed(scale: float, prompts: Mapping[int, float], *, unconditional: int = 0) -> Program:
    """Several prompts at once (A1111's AND): ``u + scale Σ w_k (c_k - u)``.

    One prompt of weight 1 is :func:`classifier_free`; as there, a scale below 1 counts as 1.

    Args:
        prompts: branch -> weight; negative weights push away.
    """
    if len(prompts) == 1 and 1.0 in prompts.values():
        return classifier_free(scale, unconditional=unconditional, conditional=next(iter(prompts)))
    if not math.isfinite(scale):
        raise ValueError(f"guidance scale must be finite, not {scale}")
    scale = max(scale, 1.0)
    rest = 1 - scale * sum(prompts.values())
    branches = ((unconditional, rest), *((k, scale * w) for k, w in prompts.items()))
    # What is left of weights that cancel is rounding, and not worth a branch.
    kept = tuple((k, w) for k, w in branches if abs(w) > 1e-9)
    return lambda step: kept


def interval(inside: Program, low: float, high: float, outside: Program | None = None) -> Program:
    """``inside`` where ``low < sigma <= high``, elsewhere ``outside`` (by default a plain branch).

    Args:
        low, high: noise levels, ``sqrt((1 - ā) / ā)``; 0 and ``math.inf`` for the whole run.
    """
    if not 0 <= low < high:
        raise ValueError(f"a guidance interval needs 0 <= low < high, not {low} and {high}")
    other = plain() if outside is None else outside
    return lambda step: inside(step) if low < step.sigma <= high else other(step)


def until(inside: Program, share: float, outside: Program | None = None) -> Program:
    """``inside`` in the first ``share`` of a run's calls, then ``outside`` (by default a plain
    branch). Zhang et al. 2024, "Cross-Attention Makes Inference Cumbersome in Text-to-Image
    Diffusion Models" (T-GATE), section 4.

    Args:
        share: 1 is ``inside`` throughout, 0 never.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share of the run is within 0 and 1, not {share}")
    other = plain() if outside is None else outside
    return lambda step: inside(step) if step.index < share * step.total else other(step)


def program(
    scale: float,
    low: float = 0.0,
    high: float = math.inf,
    share: float = 1.0,
    *,
    prompts: Mapping[int, float] | None = None,
    unconditional: int = UNCONDITIONAL,
) -> Program:
    """What a request's guidance scale and interval mean: none, CFG, or CFG in an interval.

    Args:
        share: of the run, after which there is no guidance either; see :func:`until`.
        prompts: as for :func:`composed`; default: branch 1 alone. Outside the interval they are
            added without guidance.
    """
    said = {CONDITIONAL: 1.0} if prompts is None else prompts
    inside = composed(scale, said, unconditional=unconditional)
    outside = composed(1.0, said, unconditional=unconditional)
    if low > 0 or not math.isinf(high):
        inside = interval(inside, low, high, outside)
    return inside if share >= 1 else until(inside, share, outside)


def by_step(programs: Sequence[Program]) -> Program:
    """A program for each sampling step: prompts that change during a run.

    Samplers that ask several times a step (Heun), or once more a run (PNDM), stay with their
    step's.
    """
    return lambda step: programs[step.index * len(programs) // step.total](step)


def combine(predictions: Sequence[Tensor] | Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted sum of branches.

    Args:
        predictions: one a branch, shape ``[...]`` each, or stacked ``[branches, ...]``.
        weights: one a branch.

    Returns:
        shape ``[...]``, float32 or wider: scales around 7.5 amplify float16's rounding.
    """
    if len(predictions) != len(weights):
        raise ValueError(f"{len(predictions)} predictions but {len(weights)} weights")
    total = working(predictions[0]) * weights[0]
    for prediction, weight in zip(predictions[1:], weights[1:], strict=True):
        total = total + working(prediction) * weight
    return total


def cfg(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of two predictions, ``u + scale (c - u)``, float32 or wider."""
    return combine([uncond, cond], [1 - scale, scale])


def rescaled(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Pull the spread of a guided prediction back to that of the conditional one.

    Lin et al. 2024, Eq. 15 and 16. Standard deviations are a picture's, over everything but the
    batch, unbiased, as the reference takes them.

    Args:
        guided: shape ``[B, ...]``.
        cond: the same at a guidance scale of 1: the conditional prediction, or, of several
            prompts at once, ``u + Σ w_k (c_k - u)``.
        phi: 0 leaves ``guided`` alone, 1 matches the spread; 0.7 is the paper's choice.
    """
    guided, cond = working(guided), working(cond)
    if phi == 0:
        return guided
    dims = tuple(range(1, guided.ndim))
    ratio = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return guided * (phi * ratio + (1 - phi))


def guidance_embedding(scale: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sinusoid that tells a guidance-distilled student its scale.

    Luo et al. 2023 (LCM), Section 4.3: of ``1000 (scale - 1)``, with the transformer's frequencies,
    sines first.

    Args:
        scale: ``[B]``.
        width: ``time_cond_proj_dim``.

    Returns:
        ``[B, width]``.
    """
    half = width // 2
    rate = math.log(10000.0) / (half - 1)
    frequencies = torch.exp(-rate * torch.arange(half, dtype=torch.float32, device=scale.device))
    angle = 1000 * (scale.float() - 1)[:, None] * frequencies
    return torch.nn.functional.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, width % 2)).to(
        dtype
    )
