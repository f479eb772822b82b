"""Guidance programs and their arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from safelight.diffusion import guidance
from safelight.diffusion.guidance import Step


def draw(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def at(sigma: float) -> Step:
    return Step(index=3, total=10, timestep=500.0, sigma=sigma)


def test_guidance_is_off_at_one_and_below() -> None:
    for scale in (1.0, 0.5, 0.0, -2.0):
        assert guidance.program(scale)(at(1.0)) == ((1, 1.0),)
    assert guidance.program(1.0 + 1e-9)(at(1.0)) != ((1, 1.0),)
    assert guidance.program(7.5)(at(1.0)) == ((0, -6.5), (1, 7.5))
    with pytest.raises(ValueError, match="finite"):
        guidance.program(math.nan)


def test_interval() -> None:
    program = guidance.program(5.0, 0.3, 5.0)
    assert [len(program(at(s))) for s in (14.6, 5.0, 1.0, 0.31, 0.3, 0.1)] == [1, 2, 2, 2, 1, 1]
    with pytest.raises(ValueError, match="interval"):
        guidance.program(5.0, 3.0, 1.0)


def test_composition_reduces_to_cfg_and_weights_sum_to_one() -> None:
    assert guidance.composed(5.0, {1: 1.0})(at(1)) == ((0, -4.0), (1, 5.0))
    branches = guidance.composed(7.0, {1: 0.7, 2: -0.3, 3: 0.6})(at(1))
    assert sum(weight for _, weight in branches) == pytest.approx(1)
    assert guidance.composed(1.0, {2: 1.0})(at(1)) == ((2, 1.0),)


def test_prompt_editing_is_a_program_too() -> None:
    def edited(step: Step) -> guidance.Branches:
        return guidance.classifier_free(5.0, conditional=1 if step.progress < 0.5 else 2)(step)

    assert edited(Step(4, 10, 0, 1))[1][0] == 1
    assert edited(Step(5, 10, 0, 1))[1][0] == 2


def test_combine() -> None:
    u, c = draw(0), draw(1)
    expected = u + 7.5 * (c - u)
    weights = [w for _, w in guidance.program(7.5)(at(1))]
    assert torch.allclose(guidance.combine([u, c], weights), expected, atol=1e-5)
    assert torch.allclose(guidance.combine(torch.stack([u, c]), weights), expected, atol=1e-5)
    assert torch.equal(guidance.cfg(u, c, 7.5), guidance.combine([u, c], weights))
    assert torch.equal(guidance.combine([c], [1.0]), c)
    assert guidance.combine([u.half(), c.half()], weights).dtype == torch.float32
    with pytest.raises(ValueError, match="weights"):
        guidance.combine([u, c], [1.0])


def test_rescale_against_diffusers() -> None:
    pipelines = pytest.importorskip(
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
    )
    guided, cond = 3 * draw(0) + 0.5, draw(1)
    for phi in (0.0, 0.3, 0.7, 1.0):
        theirs = pipelines.rescale_noise_cfg(guided, cond, guidance_rescale=phi)
        assert torch.allclose(guidance.rescaled(guided, cond, phi), theirs, atol=2e-6)
    full = guidance.rescaled(guided, cond, 1.0)
    assert torch.allclose(full.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))


def test_guidance_embedding_shape_and_values() -> None:
    out = guidance.guidance_embedding(torch.tensor([1.0, 8.5]), 257)
    assert out.shape == (2, 257)
    assert torch.equal(out[0, :128], torch.zeros(128))
    assert float(out[1, 0]) == pytest.approx(math.sin(7500.0), abs=1e-3)
