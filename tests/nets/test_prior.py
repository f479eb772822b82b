"""The prior against diffusers', block by block."""

from __future__ import annotations

import torch
from benchmarks.parity_nets import build
from diffusers import PriorTransformer
from torch import Tensor, nn

from safelight.nets.prior import Prior
from safelight.nets.taps import taps
from safelight.spec import PriorSpec

SPEC = PriorSpec(heads=4, head_width=8, layers=3, embedding_width=24, text_tokens=9)
BLOCKS = [f"transformer_blocks.{i}" for i in range(SPEC.layers)]


def inputs(batch: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    width, tokens = SPEC.embedding_width, SPEC.text_tokens
    mask = torch.arange(tokens)[None] < torch.tensor([[tokens], [4], [1]])[:batch]
    times = torch.tensor([960, 480, 0])[:batch]
    return draw(batch, width), times, draw(batch, width), draw(batch, tokens, width), mask


def reference(peer: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    x, time, embedding, states, mask = given
    output = peer(x, time, embedding, encoder_hidden_states=states, attention_mask=mask)
    return output.predicted_image_embedding


def pair() -> tuple[Prior, nn.Module]:
    peer = PriorTransformer(
        num_attention_heads=SPEC.heads,
        attention_head_dim=SPEC.head_width,
        num_layers=SPEC.layers,
        embedding_dim=SPEC.embedding_width,
        num_embeddings=SPEC.text_tokens,
    )
    peer = peer.eval().requires_grad_(False)
    given = inputs()
    ours = build(
        lambda: Prior(SPEC), peer, seed=0, groups=0, passes=[lambda: reference(peer, given)]
    )
    return ours, peer


@torch.no_grad()
def test_every_block_agrees_and_the_mask_matters() -> None:
    ours, peer = pair()
    given = inputs()
    with taps(peer, BLOCKS) as theirs:
        expected = reference(peer, given)
    with taps(ours, BLOCKS) as seen:
        found = ours(*given)
    assert 0.5 < expected.std() < 2
    assert (found - expected).abs().max() <= 1e-5
    for name in BLOCKS:
        assert (seen[name] - theirs[name]).abs().max() <= 1e-5 * theirs[name].std(), name
    whole = torch.ones_like(given[-1])
    assert (ours(*given[:-1], whole) - expected).abs()[1:].max() > 1e-2
    assert torch.allclose(ours(*given[:-1], whole)[0], expected[0], atol=1e-5)
    padded = given[3].clone()
    padded[1, 4:] += 9  # what is masked does not count
    assert torch.allclose(ours(*given[:3], padded, given[4]), expected, atol=1e-5)


@torch.no_grad()
def test_embeddings_return_to_their_own_scale() -> None:
    ours, peer = pair()
    x = inputs()[0]
    assert torch.equal(ours.to_embedding(x), peer.post_process_latents(x))
    assert not torch.equal(ours.to_embedding(x), x)


def test_published_size() -> None:
    with torch.device("meta"):
        ours, peer = Prior(PriorSpec()), PriorTransformer()
    shapes = {key: value.shape for key, value in peer.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
