"""What a network predicts, and how to read it as another prediction.

Salimans & Ho 2022, "Progressive Distillation", Appendix D. With ``x = a x0 + s eps``,
``a = sqrt(ā)`` and ``s = sqrt(1 - ā)``:

    v   = a eps - s x0
    x0  = a x - s v = (x - s eps) / a
    eps = s x + a v = (x - a x0) / s

Arithmetic is in float32 or better whatever comes in, and stays there.
"""

from __future__ import annotations

import torch
from torch import Tensor

Level = Tensor | float
"""ā: a float, a scalar tensor, or shape ``[B]`` (one a picture)."""


def working(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def split(abar: Level, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """``(sqrt(ā), sqrt(1 - ā))``, shaped to broadcast against ``like`` [B, ...].

    The roots are taken before the cast, so that a float64 ā keeps 1 - ā exact.
    """
    if not isinstance(abar, Tensor):
        return abar**0.5, (1 - abar) ** 0.5
    if abar.ndim == 1:
        abar = abar.reshape(-1, *(1,) * (like.ndim - 1))
    dtype = torch.promote_types(like.dtype, torch.float32)
    return (
        abar.sqrt().to(like.device, dtype),
        (1 - abar).sqrt().to(like.device, dtype),
    )


def x0_from(pred: Tensor, x: Tensor, a: Tensor | float, s: Tensor | float, kind: str) -> Tensor:
    """x0 from a prediction, given ``a = sqrt(ā)`` and ``s = sqrt(1 - ā)``."""
    pred, x = working(pred), working(x)
    if kind == "epsilon":
        return (x - s * pred) / a
    if kind == "v":
        return a * x - s * pred
    if kind == "x0":
        return pred
    raise ValueError(f"prediction_type {kind!r}: epsilon, v or x0")


def eps_from(pred: Tensor, x: Tensor, a: Tensor | float, s: Tensor | float, kind: str) -> Tensor:
    """The noise from a prediction, given ``a = sqrt(ā)`` and ``s = sqrt(1 - ā)``."""
    pred, x = working(pred), working(x)
    if kind == "epsilon":
        return pred
    if kind == "v":
        return s * x + a * pred
    if kind == "x0":
        return (x - a * pred) / s
    raise ValueError(f"prediction_type {kind!r}: epsilon, v or x0")


def to_x0(pred: Tensor, x: Tensor, abar_t: Level, prediction_type: str) -> Tensor:
    """The clean picture that a prediction implies.

    Args:
        pred, x: shape ``[B, ...]``; the prediction and the noised latents it was made from (VP).
        abar_t: ā, a float or ``[B]``.
        prediction_type: what ``pred`` is: ``epsilon``, ``v`` or ``x0``.

    Returns:
        shape of ``x``, float32 or wider. Not finite for ``epsilon`` where ā is 0.
    """
    return x0_from(pred, x, *split(abar_t, x), prediction_type)


def to_eps(pred: Tensor, x: Tensor, abar_t: Level, prediction_type: str) -> Tensor:
    """The noise that a prediction implies; arguments as :func:`to_x0`."""
    return eps_from(pred, x, *split(abar_t, x), prediction_type)


def to_v(pred: Tensor, x: Tensor, abar_t: Level, prediction_type: str) -> Tensor:
    """The velocity that a prediction implies; arguments as :func:`to_x0`."""
    if prediction_type == "v":
        return working(pred)
    a, s = split(abar_t, x)
    if prediction_type == "epsilon":  # v = (eps - s x) / a
        return (working(pred) - s * working(x)) / a
    if prediction_type == "x0":  # v = (a x - x0) / s
        return (a * working(x) - working(pred)) / s
    raise ValueError(f"prediction_type {prediction_type!r}: epsilon, v or x0")


def noised(x0: Tensor, noise: Tensor, abar_t: Level) -> Tensor:
    """``sqrt(ā) x0 + sqrt(1 - ā) noise``, float32 or wider. Ho et al. 2020, Eq. 4."""
    a, s = split(abar_t, x0)
    return a * working(x0) + s * working(noise)


def target(prediction_type: str, x0: Tensor, noise: Tensor, abar_t: Level) -> Tensor:
    """What the network should answer; shapes as ``x0``, float32 or wider."""
    if prediction_type == "epsilon":
        return working(noise)
    if prediction_type == "x0":
        return working(x0)
    if prediction_type == "v":
        a, s = split(abar_t, x0)
        return a * working(noise) - s * working(x0)
    raise ValueError(f"prediction_type {prediction_type!r}: epsilon, v or x0")
