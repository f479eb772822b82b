"""The slots of the UNet that a conditioner may fill."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """One branch of one picture: everything the UNet reads beside latents and timestep."""

    tokens: Tensor
    """``(S, context_width)``, for cross-attention."""
    vector: Tensor | None = None
    """``()`` integer label or ``(class_embedding_size,)`` vector."""
    planes: Tensor | None = None
    """``(C, h, w)``, concatenated behind the latents."""
    guidance: Tensor | None = None
    """``(guidance_embedding_size,)``, for guidance-distilled students."""

    @property
    def shape(self) -> tuple[object, ...]:
        """Branches of equal shape can share one network call."""
        parts = (self.tokens, self.vector, self.planes, self.guidance)
        return tuple(None if part is None else tuple(part.shape) for part in parts)


def pad_tokens(tokens: Tensor, length: int, empty: Tensor) -> Tensor:
    """Lengthen ``(S, width)`` tokens to ``length`` with whole windows of the empty prompt.

    Both branches of a guided step must have equally many tokens to share a call.
    """
    missing = length - len(tokens)
    return torch.cat([tokens, *[empty] * (missing // len(empty))]) if missing else tokens
