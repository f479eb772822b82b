"""The safety checker's scores against diffusers' on a micro tower, and its rule by hand."""

from __future__ import annotations

import pytest
import torch
from benchmarks.parity_nets import clip_config, draw, scaling
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig
from transformers import CLIPVisionModel as PeerTower

from safelight import presets
from safelight.nets.safety_head import Cosines, SafetyHead, adjusted_scores
from safelight.spec import VisionSpec

SPEC = VisionSpec(
    image_size=14, patch_size=7, width=32, layers=2, heads=4, mlp_width=64, projection_width=24
)


def peer_of(spec: VisionSpec) -> StableDiffusionSafetyChecker:
    config = CLIPConfig(
        vision_config=clip_config(spec),
        text_config={"num_hidden_layers": 1},
        projection_dim=spec.projection_width,
    )
    return StableDiffusionSafetyChecker(config).eval().requires_grad_(False)


def published(key: str) -> str:
    """transformers 5 drops the inner ``vision_model.``; files keep it."""
    if key.startswith("vision_model.") and not key.startswith("vision_model.vision_model."):
        return f"vision_model.{key}"
    return key


@torch.no_grad()
def test_scores_are_diffusers() -> None:
    peer = peer_of(SPEC)
    assert isinstance(peer.vision_model, PeerTower)
    pixels = torch.randn(16, 3, 14, 14, generator=torch.Generator().manual_seed(2))
    draw(peer, 0)
    with scaling(peer, 0):
        peer.visual_projection(peer.vision_model(pixels).pooler_output)
    # Thresholds such that some pictures have a score above zero.
    peer.concept_embeds_weights.mul_(0.05).add_(0.4)
    peer.special_care_embeds_weights.mul_(0.05).add_(0.1)
    with torch.device("meta"):
        ours = SafetyHead(SPEC)
    state = {published(key): value for key, value in peer.state_dict().items()}
    ours.load_state_dict(state, strict=True, assign=True)
    concepts, special = ours.eval()(pixels)
    _, unsafe = peer(pixels, torch.ones(16, 1))
    assert (concepts > 0).any(1).tolist() == unsafe
    assert 0 < sum(unsafe) < 16
    assert 0 < (special > 0).any(1).sum() < 16
    assert torch.equal((concepts * 1000).round() / 1000, concepts)


def scores(concepts: list[float], special: list[float]) -> tuple[list[float], list[float]]:
    zero = Cosines(torch.zeros(len(concepts)), torch.zeros(len(special)))
    found = adjusted_scores(Cosines(torch.tensor([concepts]), torch.tensor([special])), zero)
    return tuple([round(x, 3) for x in row[0].tolist()] for row in found)


def test_scores_are_rounded_to_three_decimals() -> None:
    assert scores([0.0004, 0.0006, -0.0006], [-1.0])[0] == [0.0, 0.001, -0.001]


def test_one_special_concept_raises_all_that_follow() -> None:
    assert scores([-0.005, -0.02], [-0.1, -0.1, -0.1]) == ([-0.005, -0.02], [-0.1, -0.1, -0.1])
    assert scores([-0.005, -0.02], [-0.005, 0.001, -0.005]) == (
        [0.005, -0.01],
        [-0.005, 0.001, 0.005],
    )
    assert scores([0.0], [0.2, 0.2, 0.2])[0] == [0.01]  # once, not three times
    assert scores([0.0], [0.0004, -1.0, -1.0])[0] == [0.0]  # rounded before it is looked at


def test_what_is_not_a_number_stays_so() -> None:
    concepts, special = scores([float("nan"), 0.5], [float("nan"), 0.5, 0.0])
    assert concepts[0] != concepts[0]
    assert special[0] != special[0]
    assert concepts[1] == pytest.approx(0.51)


def test_the_rule_is_diffusers_at_the_border() -> None:
    """Its loop, on cosines it did not compute: thousands of values around every threshold."""
    generator = torch.Generator().manual_seed(3)
    peer = peer_of(SPEC.replace(width=8, heads=1, layers=1, mlp_width=8, projection_width=20))
    cosines = torch.rand(400, 20, generator=generator) * 0.02 - 0.01
    cosines[:, :17] += 0.2
    # With unit vectors as concepts, the embedding's own numbers are the cosines.
    embeddings = torch.cat([cosines, (1 - cosines.square().sum(1, keepdim=True)).sqrt()], dim=1)
    unit = torch.eye(21)
    peer.concept_embeds = torch.nn.Parameter(unit[:17])
    peer.special_care_embeds = torch.nn.Parameter(unit[17:20])
    weights = 0.2075 + torch.rand(17, generator=generator) * 0.03, torch.zeros(3)
    peer.concept_embeds_weights.data, peer.special_care_embeds_weights.data = weights
    peer.vision_model.forward = lambda pixels: (None, pixels)
    peer.visual_projection = torch.nn.Identity()
    normalised = torch.nn.functional.normalize(embeddings)
    _, unsafe = peer(embeddings, torch.ones(400, 1))
    found = adjusted_scores(Cosines(normalised[:, :17], normalised[:, 17:20]), Cosines(*weights))
    assert (found.concepts > 0).any(1).tolist() == unsafe
    assert 20 < sum(unsafe) < 380


def test_published_size() -> None:
    with torch.device("meta"):
        ours = SafetyHead(presets.CLIP_L_VISION)
    parameters = list(ours.parameters())
    assert sum(p.numel() for p in parameters) == 303_981_588
    assert len(parameters) == 396
