"""The CLIP towers against transformers', tap by tap."""

from __future__ import annotations

import pytest
import torch
from benchmarks.parity_cases import text_case, vision_case
from benchmarks.parity_nets import Case, compare, record

from safelight.nets.clip import TextTower, activate
from safelight.spec import TextSpec, VisionSpec

TEXT = TextSpec(
    vocab_size=64,
    width=32,
    layers=3,
    heads=4,
    mlp_width=96,
    context_length=12,
    bos_id=62,
    eos_id=63,
    pad_id=63,
)
TEXTS = {
    "v1: quick_gelu, padded with end-of-text": TEXT,
    "v2: gelu, padded with 0": TEXT.replace(activation="gelu", pad_id=0),
    "projection": TEXT.replace(projection_width=20),
    "projection, padded with 0": TEXT.replace(projection_width=20, pad_id=0, activation="gelu"),
}
VISION = VisionSpec(
    image_size=28, patch_size=7, width=32, layers=3, heads=4, mlp_width=96, projection_width=20
)
VISIONS = {"L: quick_gelu": VISION, "H: gelu, heads of 8": VISION.replace(activation="gelu")}


def check(case: Case) -> None:
    found = compare(case, record(case))
    assert found.agrees(tap_limit=1e-5, end_limit=1e-5), (found.worst_tap(), found.worst_end())
    assert all(0.01 < row.std < 20 for row in found.taps)


def check_faults(case: Case) -> None:
    reference = record(case)
    for name, fault in case.faults.items():
        found = compare(case, reference, fault=fault)
        assert found.worst_tap().relative > 1e-4, name
        assert found.worst_end().max_abs > 1e-5, name
    check(case)


@pytest.mark.parametrize("variant", TEXTS)
def test_text_tower(variant: str) -> None:
    case = text_case(TEXTS[variant], batch=3)
    ends = compare(case, record(case)).ends
    assert [row.name for row in ends][:2] == ["states", "pooled"]
    assert ("embedding" in [row.name for row in ends]) == bool(TEXTS[variant].projection_width)
    check(case)


@pytest.mark.parametrize("skip", [1, 2])
def test_layers_are_skipped_before_the_final_norm(skip: int) -> None:
    check(text_case(TEXT, skip=skip))


def test_the_penultimate_layer_of_a_file_without_its_last_is_the_whole_tower() -> None:
    # Published v2 folders hold 23 of OpenCLIP-H's 24 layers (Rombach et al. read the 23rd).
    case = text_case(TEXT, seed=3)
    with torch.device("meta"):
        shorter = TextTower(TEXT.replace(layers=2))
    state = {k: v for k, v in case.ours.state_dict().items() if ".layers.2." not in k}
    shorter.load_state_dict(state, strict=True, assign=True)
    with torch.no_grad():
        whole = case.ours(case.inputs["ids"], skip=1).states
        assert torch.equal(shorter(case.inputs["ids"]).states, whole)


def test_pooled_is_the_state_at_the_first_end_of_text() -> None:
    case = text_case(TEXT, batch=3)
    ids = case.inputs["ids"]
    first = [row.tolist().index(TEXT.eos_id) for row in ids]
    assert (ids == TEXT.eos_id).sum(1).min() > 1  # padded with it: there are several
    with torch.no_grad():
        output = case.ours(ids)
    assert torch.equal(output.pooled, output.states[torch.arange(3), first])


def test_a_prompt_may_be_shorter_than_the_context() -> None:
    case = text_case(TEXT)
    with torch.no_grad():
        whole = case.ours(case.inputs["ids"]).states[:, :5]
        short = case.ours(case.inputs["ids"][:, :5]).states
    assert torch.allclose(whole, short, atol=1e-5)  # causal: what follows changes nothing


def test_text_faults_are_found() -> None:
    check_faults(text_case(TEXT))


@pytest.mark.parametrize("variant", VISIONS)
def test_vision_tower(variant: str) -> None:
    case = vision_case(VISIONS[variant], batch=2)
    assert [row.name for row in compare(case, record(case)).ends] == [
        "states",
        "pooled",
        "embedding",
    ]
    check(case)


def test_vision_faults_are_found() -> None:
    check_faults(vision_case(VISION))


def test_the_two_gelus_differ() -> None:
    x = torch.linspace(-4, 4, 101)
    difference = (activate(x, "gelu") - activate(x, "quick_gelu")).abs().max()
    assert 0.01 < difference < 0.03
