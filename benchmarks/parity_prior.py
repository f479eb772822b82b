"""The prior's case of the parity check, and that of its text tower."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import PriorTransformer
from torch import Tensor, nn

from benchmarks.parity_cases import attribute, method, one_weight, other, text_case
from benchmarks.parity_nets import Case, Inputs, build
from safelight.nets.prior import Prior
from safelight.spec import PriorSpec
from safelight.store.karlo import prior_config


def prior_cases(spec: PriorSpec, *, batch: int = 2, seed: int = 0) -> Iterator[Case]:
    """The prior on random embeddings and half-masked texts, then the tower that reads them."""
    yield prior_case(spec, batch=batch, seed=seed)
    yield replace(text_case(spec.text, batch=batch, seed=seed), part="prior text")


def prior_case(spec: PriorSpec, *, batch: int, seed: int) -> Case:
    """The prior alone."""
    config = {k: v for k, v in prior_config(spec).items() if not k.startswith("_")}
    peer = PriorTransformer(**config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed + 1)
    width, tokens = spec.embedding_width, spec.text_tokens

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ends = torch.tensor([[tokens // (i + 2)] for i in range(batch)])
    inputs: Inputs = {
        "x": noise(batch, width),
        "timestep": torch.tensor([960, 40])[:batch],
        "text_embedding": noise(batch, width),
        "text_states": noise(batch, tokens, width),
        "text_mask": torch.arange(tokens)[None] <= ends,
    }

    def run_ours(module: nn.Module, given: Inputs) -> dict[str, Tensor]:
        return {"embedding": module(**given)}

    def run_peer(module: nn.Module, given: Inputs) -> dict[str, Tensor]:
        x, timestep, embedding, states, mask = given.values()
        output = module(x, timestep, embedding, encoder_hidden_states=states, attention_mask=mask)
        return {"embedding": output.predicted_image_embedding}

    passes = [lambda: run_peer(peer, inputs)]
    ours = build(lambda: Prior(spec), peer, seed=seed, groups=0, passes=passes)
    last = f"transformer_blocks.{spec.layers - 1}"
    inside = ("norm1", "attn1", "norm3", "ff")
    names = [
        *("time_embedding", "proj_in", "embedding_proj", "encoder_hidden_states_proj"),
        *(
            f"transformer_blocks.{i}{part}"
            for i in range(spec.layers)
            for part in (*(f".{name}" for name in inside), "")
        ),
        *("norm_out", "proj_to_clip_embeddings"),
    ]
    faults = {
        "GELU kind": method(
            f"{last}.ff.net.0", lambda part, x: F.gelu(part.proj(x), approximate="tanh")
        ),
        "head count": attribute(f"{last}.attn1", "heads", lambda heads: heads // 2),
        "one weight off by 1 %": one_weight(f"{last}.ff.net.2"),
        "another mask": other("text_mask", lambda mask: mask.flip(0)),
        "another text": other("text_states", lambda states: states.flip(0)),
        "another timestep": other("timestep", lambda t: t + 1),
    }
    return Case(
        "prior", ours, peer, inputs, run_ours, run_peer, {name: name for name in names}, faults
    )
