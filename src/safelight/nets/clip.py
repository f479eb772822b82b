"""The CLIP towers: text and vision, with their projections.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"
(2103.00020), section 2. Key names are those of the published ``CLIPTextModel`` and
``CLIPVisionModelWithProjection`` files ("pre_layrnorm" is really spelled so).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.layers import embedding, normal
from safelight.spec import TextSpec, VisionSpec


def activate(x: Tensor, kind: str) -> Tensor:
    """``quick_gelu`` is ``x * sigmoid(1.702 x)`` (OpenAI's towers), ``gelu`` the exact one."""
    return x * torch.sigmoid(1.702 * x) if kind == "quick_gelu" else F.gelu(x)


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases, causal for text."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with the tower's activation between them."""

    def __init__(self, width: int, mlp_width: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activate(self.fc1(x), self.activation))


class Layer(nn.Module):
    """Pre-normed attention and MLP, both residual."""

    def __init__(self, spec: TextSpec | VisionSpec, *, causal: bool) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(spec.width, spec.norm_eps)
        self.self_attn = SelfAttention(spec.width, spec.heads, causal=causal)
        self.layer_norm2 = nn.LayerNorm(spec.width, spec.norm_eps)
        self.mlp = MLP(spec.width, spec.mlp_width, spec.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Layers(nn.Module):
    """The stack of layers (``encoder`` in the published names)."""

    def __init__(self, spec: TextSpec | VisionSpec, *, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(spec, causal=causal) for _ in range(spec.layers)])

    def forward(self, x: Tensor, skip: int = 0) -> Tensor:
        """``skip``: leave out this many layers at the end."""
        for layer in self.layers[: len(self.layers) - skip]:
            x = layer(x)
        return x


class TextEmbeddings(nn.Module):
    """Token plus learned position embeddings."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.token_embedding = embedding(spec.vocab_size, spec.width)
        self.position_embedding = embedding(spec.context_length, spec.width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTransformer(nn.Module):
    """Embeddings, layers, final norm."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(spec)
        self.encoder = Layers(spec, causal=True)
        self.final_layer_norm = nn.LayerNorm(spec.width, spec.norm_eps)


class TextOutput(NamedTuple):
    """What a text tower says of a prompt."""

    states: Tensor
    """``(N, L, width)``, after the final norm: what cross-attention reads."""
    pooled: Tensor
    """``(N, width)``: the state at the first end-of-text token."""
    embedding: Tensor | None
    """``(N, projection_width)``: the projected pooled state; None without a projection."""


class TextTower(nn.Module):
    """CLIP's text encoder."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.spec = spec
        self.text_model = TextTransformer(spec)
        self.text_projection = (
            nn.Linear(spec.width, spec.projection_width, bias=False)
            if spec.projection_width
            else None
        )

    def forward(self, ids: Tensor, *, skip: int = 0) -> TextOutput:
        """Encode.

        Args:
            ids: ``(N, L)`` token ids with specials and padding, L at most ``context_length``.
            skip: layers left out at the end (diffusers' ``clip_skip``; A1111's minus one).
        """
        h = self.text_model.encoder(self.text_model.embeddings(ids), skip)
        states = self.text_model.final_layer_norm(h)
        end = (ids == self.spec.eos_id).int().argmax(dim=1)
        pooled = states[torch.arange(len(ids), device=ids.device), end]
        embedding = None if self.text_projection is None else self.text_projection(pooled)
        return TextOutput(states, pooled, embedding)


class VisionEmbeddings(nn.Module):
    """Patches by a strided convolution, a class token in front, learned positions."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(normal(spec.width, std=spec.width**-0.5))
        self.patch_embedding = nn.Conv2d(
            3, spec.width, spec.patch_size, stride=spec.patch_size, bias=False
        )
        patches = (spec.image_size // spec.patch_size) ** 2
        self.position_embedding = embedding(patches + 1, spec.width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """Embeddings, norm, layers, norm of the class token."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(spec)
        self.pre_layrnorm = nn.LayerNorm(spec.width, spec.norm_eps)
        self.encoder = Layers(spec, causal=False)
        self.post_layernorm = nn.LayerNorm(spec.width, spec.norm_eps)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """All states ``(N, 1 + patches, width)``, and the class token after the last norm."""
        h = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return h, self.post_layernorm(h[:, 0])


class VisionOutput(NamedTuple):
    """What a vision tower says of a picture."""

    states: Tensor
    """``(N, 1 + patches, width)``, before the last norm."""
    pooled: Tensor
    """``(N, width)``: the class token after the last norm."""
    embedding: Tensor
    """``(N, projection_width)``, not normalised."""


class VisionTower(nn.Module):
    """CLIP's picture encoder."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.vision_model = VisionTransformer(spec)
        self.visual_projection = nn.Linear(spec.width, spec.projection_width, bias=False)

    def forward(self, pixels: Tensor) -> VisionOutput:
        """``pixels`` (N, 3, image_size, image_size), normalised with CLIP's mean and std."""
        states, pooled = self.vision_model(pixels)
        return VisionOutput(states, pooled, self.visual_projection(pooled))
