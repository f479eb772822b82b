"""The UNet against diffusers' on micro models: every variant of the family, tap by tap."""

from __future__ import annotations

import pytest
import torch
from benchmarks.parity_cases import unet_case
from benchmarks.parity_nets import compare, record

from safelight.nets.unet import UNet
from safelight.spec import UNetSpec

V1 = UNetSpec(
    sample_size=16, channels=(16, 32, 32, 48), heads=(2, 2, 2, 2), context_width=24, norm_groups=8
)
V2 = V1.replace(heads=(1, 2, 4, 4), linear_projection=True)
X4 = V2.replace(
    in_channels=7,
    heads=(2, 2, 2, 2),
    attention=(False, True, True, True),
    only_cross_attention=(True, True, True, False),
    class_embedding="table",
    class_embedding_size=1000,
)
# One level less: in a quarter of the time, what does not depend on depth.
SHALLOW = UNetSpec(
    sample_size=8,
    channels=(16, 32),
    attention=(True, False),
    heads=(2, 2),
    only_cross_attention=(False, False),
    context_width=24,
    norm_groups=8,
)

VARIANTS = {
    "v1": (V1, (8, 8)),
    "v2: linear projection, heads a level": (V2, (8, 8)),
    "upcast attention": (V2.replace(upcast_attention=True), (8, 8)),
    "unclip": (V2.replace(class_embedding="projection", class_embedding_size=40), (8, 8)),
    "x4 upscaler": (X4, (8, 8)),
    "small: one layer a block": (V1.replace(layers_per_block=1), (8, 8)),
    "odd sizes at every level": (V1, (13, 11)),
    "depth: 5 channels in": (SHALLOW.replace(in_channels=5), (6, 4)),
    "7 channels in": (SHALLOW.replace(in_channels=7), (6, 4)),
    "inpainting: 9 channels in": (SHALLOW.replace(in_channels=9), (6, 4)),
    "guidance embedding": (SHALLOW.replace(guidance_embedding_size=12), (6, 4)),
    "attention at the coarsest level only": (SHALLOW.replace(attention=(False, True)), (6, 4)),
    "3 channels out": (SHALLOW.replace(out_channels=3), (6, 4)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tap_agrees(variant: str) -> None:
    spec, size = VARIANTS[variant]
    case = unet_case(spec, size=size, tokens=7)
    found = compare(case, record(case))
    assert found.agrees(tap_limit=1e-5, end_limit=1e-5), (found.worst_tap(), found.worst_end())
    assert {row.name for row in found.taps} == set(case.taps)
    assert all(0.01 < row.std < 20 for row in found.taps)  # nothing faded, nothing drowned
    assert found.ends[0].std == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("spec", [V1, X4], ids=["v1", "x4"])
def test_planted_faults_are_found(spec: UNetSpec) -> None:
    case = unet_case(spec, size=(8, 8), tokens=7)
    reference = record(case)
    for name, fault in case.faults.items():
        found = compare(case, reference, fault=fault)
        # By the full-size limit, ten times the one above: at some tap, and at the end.
        assert found.worst_tap().relative > 1e-4, name
        assert found.worst_end().max_abs > 1e-5, name
    assert compare(case, reference).agrees(tap_limit=1e-5, end_limit=1e-5)  # all taken back


@pytest.mark.parametrize("timesteps", [(0,), (999,), (0.5,), (333.25,)])
def test_timesteps_may_be_fractional(timesteps: tuple[float]) -> None:
    case = unet_case(SHALLOW, size=(6, 4), tokens=3, batch=1, timesteps=timesteps)
    assert compare(case, record(case)).agrees(tap_limit=1e-5, end_limit=1e-5)


def test_a_scalar_timestep_serves_the_whole_batch() -> None:
    case = unet_case(SHALLOW, size=(6, 4), tokens=3, timesteps=(7, 7))
    scalar = case.inputs | {"timestep": torch.tensor(7)}
    with torch.no_grad():
        same = case.ours(**scalar), case.ours(**case.inputs)
    assert torch.equal(*same)


def test_one_token_of_context() -> None:
    case = unet_case(SHALLOW, size=(6, 4), tokens=1)  # image variations
    assert compare(case, record(case)).agrees(tap_limit=1e-5, end_limit=1e-5)


def test_float16_weights_load_and_run() -> None:
    case = unet_case(SHALLOW, size=(6, 4), tokens=7)
    half = {key: value.half() for key, value in case.peer.state_dict().items()}
    with torch.device("meta"):
        ours = UNet(SHALLOW)
    ours.load_state_dict(half, strict=True, assign=True)
    assert {p.dtype for p in ours.parameters()} == {torch.float16}
    inputs = case.inputs | {k: case.inputs[k].half() for k in ("x", "context")}
    with torch.no_grad():
        out = ours(**inputs)
        peer = case.run_peer(case.peer.half(), inputs)["prediction"]
        full = case.run_ours(ours.float(), case.inputs)["prediction"]
    assert out.dtype == torch.float16
    assert (out - peer).abs().max() <= 1e-2
    assert (out.float() - full).abs().max() <= 5e-2


def test_upcast_scores_do_not_overflow_in_float16() -> None:
    spec = SHALLOW.replace(upcast_attention=True, linear_projection=True)
    case = unet_case(spec, size=(6, 4), tokens=7)
    for path, part in case.ours.named_modules():
        if path.endswith(("to_q", "to_k")):
            part.weight.mul_(60)  # scores of about 60 * 60 * sqrt(16)
    halved = case.inputs | {k: case.inputs[k].half() for k in ("x", "context")}
    with torch.no_grad():
        assert case.run_ours(case.ours.half(), halved)["prediction"].isfinite().all()


def test_a_missing_class_vector_is_an_error() -> None:
    with torch.device("meta"):
        unet = UNet(X4)
        with pytest.raises(ValueError, match="class vector"):
            unet(torch.zeros(1, 7, 8, 8), torch.tensor(3), torch.zeros(1, 2, 24))
