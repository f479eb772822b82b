"""Training objectives. Noise and timestep are arguments: nothing random hides inside.

Ho et al. 2020, Eq. 14 (noise prediction); Salimans & Ho 2022 (v and x0); Hang et al. 2023,
"Efficient Diffusion Training via Min-SNR Weighting Strategy", Eq. 11; Guttenberg 2023, offset
noise; Ning et al. 2023, "Input Perturbation Reduces Exposure Bias", Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from safelight.diffusion import prediction
from safelight.diffusion.schedule import Schedule

Weighting = Literal["none", "min_snr"]


def snr(abar: Tensor) -> Tensor:
    """Signal-to-noise ratio ``ā / (1 - ā) = 1 / sigma^2``; shape as ``abar``."""
    return abar / (1 - abar)


def weights(
    weighting: Weighting, abar: Tensor, prediction_type: str, *, gamma: float = 5.0
) -> Tensor:
    """Weight of each picture's squared error, in the space of its prediction.

    ``min_snr`` is ``min(SNR, gamma)`` on x0 errors (Hang et al., Eq. 11). An error in eps is
    SNR times one in x0, an error in v is SNR + 1 times: hence ``min(SNR, gamma) / SNR`` and
    ``min(SNR, gamma) / (SNR + 1)``.

    Args:
        abar: shape ``[B]``.

    Returns:
        shape ``[B]``.
    """
    if weighting == "none":
        return torch.ones_like(abar)
    if weighting != "min_snr":
        raise ValueError(f"weighting {weighting!r}: none or min_snr")
    if gamma <= 0:
        raise ValueError(f"gamma must be positive, not {gamma}")
    ratio = snr(abar)
    if prediction_type == "epsilon":
        # min(SNR, gamma) / SNR, written so that SNR = 0 gives its limit 1 and not 0/0.
        return (gamma / ratio).clamp(max=1.0)
    if prediction_type == "v":
        return ratio.clamp(max=gamma) / (ratio + 1)
    if prediction_type == "x0":
        return ratio.clamp(max=gamma)
    raise ValueError(f"prediction_type {prediction_type!r}: epsilon, v or x0")


def offset_noise(noise: Tensor, offset: Tensor, strength: float = 0.1) -> Tensor:
    """Noise with a shared shift a channel, so that a model learns very dark and bright pictures.

    Args:
        noise: ``[B, C, H, W]``, unit normal.
        offset: ``[B, C]``, unit normal.
        strength: standard deviation of the shift.
    """
    return noise + strength * offset.reshape(*offset.shape, *(1,) * (noise.ndim - offset.ndim))


def perturbed_noise(noise: Tensor, extra: Tensor, strength: float = 0.1) -> Tensor:
    """Noise for the *input* under input perturbation; the target keeps the plain ``noise``.

    Ning et al. 2023, Algorithm 1. Pass the result as ``input_noise`` to :func:`diffusion_loss`.

    Args:
        noise, extra: the same shape, unit normal each.
    """
    return noise + strength * extra


def diffusion_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    schedule: Schedule,
    prediction_type: str | None = None,
    *,
    weighting: Weighting = "none",
    gamma: float = 5.0,
    input_noise: Tensor | None = None,
    sample_weights: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Mean squared error of a prediction, one number a picture, then their mean.

    Args:
        predict: ``(x_t, t) -> prediction``; ``x_t`` has ``x0``'s shape and dtype.
        x0: ``[B, ...]``, clean latents (scaled to unit variance).
        noise: like ``x0``, unit normal (or :func:`offset_noise`).
        t: ``[B]``, timesteps, integer or fractional.
        schedule: where ā comes from.
        prediction_type: what ``predict`` gives; the schedule's own by default.
        weighting: ``none`` or ``min_snr`` (with ``gamma``).
        input_noise: noise to build ``x_t`` from when it is not ``noise`` itself
            (:func:`perturbed_noise`).
        sample_weights: ``[B]``, a further factor a picture (a prior-preservation weight, a
            mask of valid rows).
        reduction: ``mean`` gives a scalar, ``none`` gives ``[B]``.

    Returns:
        float32 or wider.
    """
    kind = schedule.prediction_type if prediction_type is None else prediction_type
    if noise.shape != x0.shape or t.shape != x0.shape[:1]:
        raise ValueError(
            f"x0 {tuple(x0.shape)} needs noise of the same shape and one timestep a picture, "
            f"not {tuple(noise.shape)} and {tuple(t.shape)}"
        )
    abar = schedule.alpha_bar(t)
    x_t = prediction.noised(x0, noise if input_noise is None else input_noise, abar)
    answer = predict(x_t.to(x0.dtype), t)
    if answer.shape != x0.shape:
        raise ValueError(f"the prediction has shape {tuple(answer.shape)}, not {tuple(x0.shape)}")
    error = prediction.working(answer) - prediction.target(kind, x0, noise, abar)
    loss = error.square().flatten(1).mean(1)
    loss = loss * weights(weighting, abar, kind, gamma=gamma).to(loss)
    if sample_weights is not None:
        loss = loss * sample_weights.to(loss)
    return loss.mean() if reduction == "mean" else loss
