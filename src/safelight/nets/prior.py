"""The prior: from a text's embedding and tokens to a picture's embedding.

Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents"
(2204.06125), section 2.2: a causal transformer over text tokens, text embedding, timestep, the
noisy picture embedding and a last learned token, whose output is the clean embedding. Key names
are those of the published ``PriorTransformer`` folders (Karlo's).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.attention import Attention
from safelight.nets.layers import TimestepMLP, sinusoid
from safelight.spec import PriorSpec

MASKED = -10000.0
"""Added to the scores of what may not be looked at. Finite, as published, so a row that is masked
whole stays a number."""


class GELU(nn.Module):
    """A linear layer and the exact GELU."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class MLP(nn.Module):
    """To four times the width and back. ``net.1`` is the published files' dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class PriorBlock(nn.Module):
    """Masked self-attention with biases, then the MLP; each pre-normed, residual.

    The second norm is called ``norm3`` because the published class has cross-attention between.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, bias=True)
        self.norm3 = nn.LayerNorm(width)
        self.ff = MLP(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), mask=mask)
        return x + self.ff(self.norm3(x))


class Prior(nn.Module):
    """Predicts the clean picture embedding (x0) from a noisy one."""

    def __init__(self, spec: PriorSpec) -> None:
        super().__init__()
        self.spec = spec
        width, embedding = spec.heads * spec.head_width, spec.embedding_width
        self.time_embedding = TimestepMLP(width, width)
        self.proj_in = nn.Linear(embedding, width)
        self.embedding_proj = nn.Linear(embedding, width)
        self.encoder_hidden_states_proj = nn.Linear(embedding, width)
        positions = spec.text_tokens + spec.extra_tokens
        self.positional_embedding = nn.Parameter(torch.zeros(1, positions, width))
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.transformer_blocks = nn.ModuleList(
            [PriorBlock(width, spec.heads) for _ in range(spec.layers)]
        )
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, embedding)
        # Statistics of the training set's embeddings; the prior works on normalised ones.
        self.clip_mean = nn.Parameter(torch.zeros(1, embedding), requires_grad=False)
        self.clip_std = nn.Parameter(torch.ones(1, embedding), requires_grad=False)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text_embedding: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
    ) -> Tensor:
        """Predict.

        Args:
            x: ``(N, embedding_width)``, the noisy, normalised picture embedding.
            timestep: ``(N,)`` or a scalar tensor.
            text_embedding: ``(N, embedding_width)``, projected.
            text_states: ``(N, text_tokens, embedding_width)``, after the tower's final norm.
            text_mask: ``(N, text_tokens)``, true (1) where a token is not padding.

        Returns:
            ``(N, embedding_width)``: the clean embedding, still normalised.
        """
        dtype = self.proj_in.weight.dtype
        times = sinusoid(timestep.reshape(-1).expand(len(x)), self.proj_in.out_features)
        h = torch.cat(
            [
                self.encoder_hidden_states_proj(text_states),
                self.embedding_proj(text_embedding)[:, None],
                self.time_embedding(times.to(dtype))[:, None],
                self.proj_in(x)[:, None],
                self.prd_embedding.expand(len(x), -1, -1),
            ],
            dim=1,
        )
        h = h + self.positional_embedding
        mask = self.mask(text_mask).to(dtype)
        for block in self.transformer_blocks:
            h = block(h, mask)
        return self.proj_to_clip_embeddings(self.norm_out(h)[:, -1])

    def mask(self, text_mask: Tensor) -> Tensor:
        """Scores to add, ``(N, 1, L, L)``: no token sees a later one or a padded text token."""
        length = self.spec.text_tokens + self.spec.extra_tokens
        later = torch.full((length, length), MASKED, device=text_mask.device).triu(1)
        padded = F.pad((1 - text_mask.float()) * MASKED, (0, self.spec.extra_tokens))
        return (padded[:, None, :] + later)[:, None]

    def to_embedding(self, x: Tensor) -> Tensor:
        """A sampled, normalised embedding in CLIP's own scale, for the unCLIP decoder."""
        return x * self.clip_std + self.clip_mean
