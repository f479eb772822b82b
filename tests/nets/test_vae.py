"""The autoencoder against diffusers', both ways, tap by tap."""

from __future__ import annotations

import pytest
import torch
from benchmarks.parity_cases import vae_cases
from benchmarks.parity_nets import Case, compare, record
from torch import nn

from safelight.nets.vae import Posterior, to_uint8
from safelight.spec import VAESpec

F8 = VAESpec(channels=(16, 32, 32, 32), norm_groups=8)
VARIANTS = {
    # One picture: of several, the reference lays the mid block's attention out in memory so that
    # the next convolution sums in another order, and 1e-6 there grows to 1.5e-5 at this depth.
    "f=8": (F8, (4, 4), 1),
    "f=4": (F8.replace(channels=(16, 32, 32), scaling_factor=0.08333), (4, 4), 2),
    "one layer a block, 8 latent channels, not square": (
        F8.replace(layers_per_block=1, latent_channels=8, channels=(8, 16), norm_groups=4),
        (5, 3),
        2,
    ),
}


def find(cases: list[Case], part: str) -> Case:
    return next(case for case in cases if case.part == part)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tap_agrees_both_ways(variant: str) -> None:
    spec, size, batch = VARIANTS[variant]
    for case in vae_cases(spec, size=size, batch=batch):
        found = compare(case, record(case))
        assert found.agrees(tap_limit=1e-5, end_limit=1e-5), (found.worst_tap(), found.worst_end())
        assert all(0.01 < row.std < 20 for row in found.taps)
        assert all(0.3 < row.std < 3 for row in found.ends)


def test_planted_faults_are_found() -> None:
    for case in vae_cases(F8, size=(4, 4)):
        reference = record(case)
        for name, fault in case.faults.items():
            found = compare(case, reference, fault=fault)
            assert found.worst_tap().relative > 1e-4, (case.part, name)
            assert found.worst_end().max_abs > 1e-5, (case.part, name)
        assert compare(case, reference).agrees(tap_limit=1e-5, end_limit=1e-5)


def test_the_log_variance_is_clamped_as_published() -> None:
    case = find(vae_cases(F8, size=(2, 2)), "vae encode")
    bias: nn.Parameter = case.ours.quant_conv.bias  # the reference's too
    bias[4], bias[5] = -70.0, 50.0
    logvar = record(case)[1]["log variance"]
    assert (logvar[:, 0] == -30).all()
    assert (logvar[:, 1] == 20).all()
    ours = case.run_ours(case.ours, case.inputs)["log variance"]
    assert (ours - logvar).abs().max() <= 1e-5


def test_the_divergence_is_the_reference_s() -> None:
    case = find(vae_cases(F8, size=(2, 2), batch=3), "vae encode")
    with torch.no_grad():
        ours = case.ours.encode(case.inputs["pixels"]).kl()
        theirs = case.peer.encode(case.inputs["pixels"]).latent_dist.kl()
    assert torch.allclose(ours, theirs, rtol=1e-5)
    assert Posterior(torch.zeros(2, 4, 1, 1), torch.zeros(2, 4, 1, 1)).kl().tolist() == [0, 0]


def test_training_forward_is_encode_and_decode() -> None:
    case = find(vae_cases(F8, size=(2, 2)), "vae encode")
    with torch.no_grad():
        pixels, posterior = case.ours(case.inputs["pixels"], case.inputs["noise"])
        sample = posterior.sample(case.inputs["noise"])
        again = case.ours.decode(sample * F8.scaling_factor)
    assert pixels.shape == case.inputs["pixels"].shape
    assert torch.allclose(pixels, again, atol=1e-5)


def test_pixels_round_half_to_even_and_are_clamped() -> None:
    values = torch.tensor([-3.0, -1.0, -1 + 1 / 255, 0.0, 1.0, 9.0])
    rounded = to_uint8(values.reshape(1, 1, 1, -1).expand(1, 3, 1, -1))
    assert rounded.shape == (1, 1, 6, 3)
    assert rounded[0, 0, :, 0].tolist() == [0, 0, 0, 128, 255, 255]
