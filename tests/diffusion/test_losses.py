"""Losses against their definitions, and what their minimisers are."""

from __future__ import annotations

import pytest
import torch

from safelight.diffusion import losses, prediction
from safelight.diffusion.schedule import Schedule
from safelight.spec import ScheduleSpec

SCHEDULE = Schedule.from_spec(ScheduleSpec())
KINDS = ("epsilon", "v", "x0")
T = torch.tensor([0, 1, 250, 500, 981, 999])


def draw(seed: int) -> torch.Tensor:
    return torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_has_no_loss_and_an_error_has_its_square(kind: str) -> None:
    x0, eps = draw(0), draw(1)
    abar = SCHEDULE.alpha_bar(T)
    truth = prediction.target(kind, x0, eps, abar)
    for off in (0.0, 0.5):
        loss = losses.diffusion_loss(
            lambda x, t, off=off: truth + off, x0, eps, T, SCHEDULE, kind, reduction="none"
        )
        assert loss.shape == (6,)
        assert torch.allclose(loss, torch.full((6,), off**2), atol=1e-6)


def test_the_network_sees_the_noised_picture() -> None:
    x0, eps = draw(0), draw(1)

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, s = (SCHEDULE.alpha_bar(T).float().reshape(-1, 1, 1, 1).sqrt(), None)
        s = (1 - SCHEDULE.alpha_bar(T)).float().reshape(-1, 1, 1, 1).sqrt()
        assert torch.equal(t, T)
        assert torch.allclose(x.float(), a * x0 + s * eps, atol=2e-2)
        assert x.dtype == torch.bfloat16
        return eps

    loss = losses.diffusion_loss(predict, x0.bfloat16(), eps, T, SCHEDULE)
    assert float(loss) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_is_one_weighting_in_every_space(kind: str) -> None:
    """The weighted loss of one and the same x0 estimate must not depend on the prediction type."""
    x0, eps, guess = draw(0), draw(1), draw(2)
    abar = SCHEDULE.alpha_bar(T)
    x = prediction.noised(x0, eps, abar)
    said = {
        "x0": guess,
        "epsilon": prediction.to_eps(guess, x, abar, "x0"),
        "v": prediction.to_v(guess, x, abar, "x0"),
    }[kind]
    loss = losses.diffusion_loss(
        lambda x, t: said, x0, eps, T, SCHEDULE, kind, weighting="min_snr", reduction="none"
    )
    snr = losses.snr(abar)
    expected = snr.clamp(max=5.0) * (guess - x0).double().square().flatten(1).mean(1)
    assert torch.allclose(loss.double(), expected, rtol=2e-3)


def test_min_snr_published_forms() -> None:
    abar = SCHEDULE.alpha_bar(T)
    snr = losses.snr(abar)
    low = torch.minimum(snr, torch.tensor(5.0))
    assert torch.allclose(losses.weights("min_snr", abar, "epsilon"), low / snr)
    assert torch.allclose(losses.weights("min_snr", abar, "v"), low / (snr + 1))
    assert torch.allclose(losses.weights("min_snr", abar, "x0"), low)
    zero = torch.zeros(1, dtype=torch.float64)
    assert float(losses.weights("min_snr", zero, "epsilon")) == 1  # the limit, not 0/0
    with pytest.raises(ValueError, match="weighting"):
        losses.weights("min-snr", abar, "v")  # type: ignore[arg-type]


def test_offset_and_perturbation() -> None:
    eps, shift = torch.zeros(6, 4, 8, 8), torch.randn(6, 4)
    moved = losses.offset_noise(eps, shift, 0.1)
    assert torch.allclose(moved, 0.1 * shift[:, :, None, None].expand_as(eps))
    x0, eps, extra = draw(0), draw(1), draw(2)
    seen: list[torch.Tensor] = []

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return eps  # the target is the noise without its perturbation

    loss = losses.diffusion_loss(
        predict, x0, eps, T, SCHEDULE, input_noise=losses.perturbed_noise(eps, extra)
    )
    assert float(loss) == 0
    plain = prediction.noised(x0, eps, SCHEDULE.alpha_bar(T))
    assert float((seen[0] - plain).abs().max()) > 0.1


def test_weights_and_shapes() -> None:
    x0, eps = draw(0), draw(1)
    keep = torch.tensor([1.0, 0, 0, 0, 0, 0])
    loss = losses.diffusion_loss(
        lambda x, t: eps + 1, x0, eps, T, SCHEDULE, sample_weights=keep, reduction="none"
    )
    assert torch.allclose(loss, keep)
    with pytest.raises(ValueError, match="one timestep a picture"):
        losses.diffusion_loss(lambda x, t: x, x0, eps, T[:2], SCHEDULE)
    with pytest.raises(ValueError, match="prediction has shape"):
        losses.diffusion_loss(lambda x, t: x[:, :2], x0, eps, T, SCHEDULE)


def test_gradients_reach_the_prediction_and_fractions_are_allowed() -> None:
    scale = torch.ones((), requires_grad=True)
    t = torch.tensor([0.5, 10.25, 500.0, 998.9, 3.0, 999.0])
    loss = losses.diffusion_loss(lambda x, t: scale * x, draw(0), draw(1), t, SCHEDULE)
    loss.backward()
    assert scale.grad is not None
    assert torch.isfinite(scale.grad)
