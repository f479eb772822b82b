"""The safety checker's network: how near a picture is to each hidden concept. Scores only.

Whether a score means "not safe" is :mod:`safelight.safety`'s to say, and what to do about it
generation's. Rando et al. 2022, "Red-Teaming the Stable Diffusion Safety Filter" (2210.04610),
describe the published checker; key names are those of its folder (``vision_model`` twice is
right).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.clip import VisionTransformer
from safelight.spec import VisionSpec

SPECIAL_ADJUSTMENT = 0.01
"""What one special concept above its threshold adds to every score after it."""


class SafetyScores(NamedTuple):
    """Above 0 is above the concept's threshold. Rounded to three decimals, as published."""

    concepts: Tensor
    """``(N, 17)``: any above 0, and the published checker calls the picture not safe."""
    special: Tensor
    """``(N, 3)``: only make the others stricter."""


class Cosines(NamedTuple):
    """Cosine similarities of a picture's embedding, in float32."""

    concepts: Tensor
    special: Tensor


def adjusted_scores(cosines: Cosines, thresholds: Cosines) -> SafetyScores:
    """The published rule, in its order.

    Special concepts are taken one after the other, each rounded before it is looked at; one that
    is above 0 raises every later special concept and all concepts by 0.01, once. (The checker's
    ONNX form rounds nothing and adjusts after all special ones: it can differ at the border.)
    A cosine that is not a number gives a score that is not a number, never a low one.

    Args:
        cosines: ``(N, 17)`` and ``(N, 3)``.
        thresholds: ``(17,)`` and ``(3,)``.
    """
    adjustment = torch.zeros_like(cosines.special[:, 0])
    special = []
    for cosine, threshold in zip(cosines.special.unbind(1), thresholds.special, strict=True):
        special.append(_round(cosine - threshold + adjustment))
        adjustment = adjustment.masked_fill(special[-1] > 0, SPECIAL_ADJUSTMENT)
    concepts = _round(cosines.concepts - thresholds.concepts + adjustment[:, None])
    return SafetyScores(concepts, torch.stack(special, dim=1))


def _round(score: Tensor) -> Tensor:
    return (score * 1000).round() / 1000


class _Vision(nn.Module):
    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.vision_model = VisionTransformer(spec)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vision_model(pixels)[1]


class SafetyHead(nn.Module):
    """A CLIP vision tower and the embeddings of concepts (``StableDiffusionSafetyChecker``)."""

    def __init__(self, spec: VisionSpec, *, concepts: int = 17, special: int = 3) -> None:
        super().__init__()
        self.spec = spec
        width = spec.projection_width

        def constant(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.ones(shape), requires_grad=False)

        self.vision_model = _Vision(spec)
        self.visual_projection = nn.Linear(spec.width, width, bias=False)
        self.concept_embeds = constant(concepts, width)
        self.special_care_embeds = constant(special, width)
        self.concept_embeds_weights = constant(concepts)
        self.special_care_embeds_weights = constant(special)

    def cosines(self, pixels: Tensor) -> Cosines:
        """Similarities of pictures with every concept.

        Args:
            pixels: ``(N, 3, image_size, image_size)``, normalised with CLIP's mean and std.
        """
        picture = F.normalize(self.visual_projection(self.vision_model(pixels)))
        concepts, special = F.normalize(self.concept_embeds), F.normalize(self.special_care_embeds)
        return Cosines((picture @ concepts.T).float(), (picture @ special.T).float())

    def forward(self, pixels: Tensor) -> SafetyScores:
        """Scores of pictures; ``pixels`` as for :meth:`cosines`."""
        thresholds = Cosines(
            self.concept_embeds_weights.float(), self.special_care_embeds_weights.float()
        )
        return adjusted_scores(self.cosines(pixels), thresholds)
