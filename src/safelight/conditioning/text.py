"""Prompts to tokens.

The unpooled states of the text tower, after its final norm, are what cross-attention reads
(Rombach et al. 2022, section 3.3). A prompt longer than one window is encoded window by window
and concatenated; nothing is cut. Weights follow the A1111 convention: states are multiplied by
their weight, then the prompt's mean is restored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.conditioning.slots import Conditioning, pad_tokens
from safelight.errors import InvalidRequest

if TYPE_CHECKING:
    from safelight.model import Model


def encode_prompts(
    model: Model,
    prompts: Sequence[str | Sequence[tuple[str, float]]],
    *,
    clip_skip: int = 0,
) -> list[Conditioning]:
    """Encode prompts that will share network calls: all get equally many tokens.

    Args:
        model: with a text tower and a tokenizer.
        prompts: plain strings, or fragments with weights
            (:func:`safelight.text.weighting.parse`).
        clip_skip: layers left out at the end of the text tower (diffusers' count).

    Raises:
        InvalidRequest: the model has no text tower.
    """
    if model.text is None or model.tokenizer is None:
        raise InvalidRequest("prompt", f"{model.spec.name} does not read text.")
    if not 0 <= clip_skip < model.text.spec.layers:
        raise InvalidRequest(
            "clip_skip", f"{clip_skip}.", f"This text tower has {model.text.spec.layers} layers."
        )
    parsed = [((p, 1.0),) if isinstance(p, str) else tuple(p) for p in prompts]
    states = [_encode(model, fragments, clip_skip) for fragments in parsed]
    longest = max(len(s) for s in states)
    empty = _encode(model, (("", 1.0),), clip_skip)
    return [Conditioning(pad_tokens(s, longest, empty)) for s in states]


@torch.inference_mode()
def _encode(model: Model, fragments: Sequence[tuple[str, float]], clip_skip: int) -> Tensor:
    key = (tuple(fragments), clip_skip)
    cached = model.text_cache.get(key)
    if cached is not None:
        return cached
    assert model.text is not None
    assert model.tokenizer is not None
    chunks = model.tokenizer.weighted_chunks(fragments)
    ids = torch.tensor([chunk.ids for chunk in chunks], device=model.device)
    states = model.text(ids, skip=clip_skip).states
    weights = torch.tensor([chunk.weights for chunk in chunks], device=model.device)
    if bool((weights != 1).any()):
        weighted = states.float() * weights[:, :, None]
        states = (weighted * (states.float().mean() / weighted.mean())).to(states.dtype)
    tokens = states.flatten(0, 1)
    model.text_cache.put(key, tokens)
    return tokens
