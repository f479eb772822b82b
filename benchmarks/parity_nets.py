"""Our networks beside the reference's, with random weights that leave no layer unseen.

The reference is built from our own spec, so a wrong reading of a published number shows; ours is
built without memory of its own and *assigned the reference's tensors*, so that weights exist once.

Fresh random weights hide errors: signals fade or are drowned by the residual stream long before
the end. Here every convolution and linear layer is scaled, while one forward pass runs, to put
out unit standard deviation; norms have random weights and biases. Two things are then made
small on purpose, because an epsilon inside a norm shows only where the norm's input is small:
every fourth group of channels in the feature maps, and what enters the first LayerNorm of a
transformer. Every layer's output is compared relative to its own standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safelight.nets.taps import taps
from safelight.spec import PriorSpec, TextSpec, UNetSpec, VAESpec, VisionSpec

QUIET = 0.03
"""Standard deviation of what is made small. With it, one epsilon (1e-5) in place of the other
(1e-6) changes what a norm puts out by 5e-3."""

Inputs = dict[str, Any]
Run = Callable[[nn.Module, Inputs], dict[str, Tensor]]
Fault = Callable[[nn.Module, Inputs], AbstractContextManager[Inputs]]


@dataclass(frozen=True)
class Case:
    """One network in both libraries, how each is run, and faults that the check must find."""

    part: str
    ours: nn.Module
    peer: nn.Module
    inputs: Inputs
    run_ours: Run
    run_peer: Run
    taps: dict[str, str]
    """Our names of submodules, in running order, to the reference's."""
    faults: dict[str, Fault]


class Row(NamedTuple):
    """One tap (or end) compared."""

    name: str
    std: float
    """Standard deviation of the reference's output."""
    max_abs: float
    relative: float
    """``max_abs / std``."""


class Comparison(NamedTuple):
    """What :func:`compare` found."""

    taps: list[Row]
    ends: list[Row]

    def worst_tap(self) -> Row:
        """The tap with the largest relative difference."""
        return max(self.taps, key=lambda row: row.relative)

    def worst_end(self) -> Row:
        """The output with the largest absolute difference."""
        return max(self.ends, key=lambda row: row.max_abs)

    def agrees(self, *, tap_limit: float, end_limit: float) -> bool:
        """Every tap within ``tap_limit`` of its own standard deviation, every end absolutely."""
        return self.worst_tap().relative <= tap_limit and self.worst_end().max_abs <= end_limit


# -- the reference, from our specs --------------------------------------------------------------


def unet_config(spec: UNetSpec) -> dict[str, Any]:
    """Arguments of diffusers' ``UNet2DConditionModel``."""
    last = len(spec.channels) - 1
    kinds = ["CrossAttn" if attention else "" for attention in spec.attention]
    config: dict[str, Any] = {
        "sample_size": spec.sample_size,
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in kinds[::-1]),
        "only_cross_attention": spec.only_cross_attention,
        "mid_block_only_cross_attention": False,
        "block_out_channels": spec.channels,
        "layers_per_block": spec.layers_per_block,
        "norm_num_groups": spec.norm_groups,
        "norm_eps": spec.norm_eps,
        "cross_attention_dim": spec.context_width,
        "attention_head_dim": spec.heads,
        "use_linear_projection": spec.linear_projection,
        "upcast_attention": spec.upcast_attention,
    }
    assert len(kinds) == last + 1
    if spec.class_embedding == "table":
        config["num_class_embeds"] = spec.class_embedding_size
    elif spec.class_embedding == "projection":
        config["class_embed_type"] = "projection"
        config["projection_class_embeddings_input_dim"] = spec.class_embedding_size
    if spec.guidance_embedding_size:
        config["time_cond_proj_dim"] = spec.guidance_embedding_size
    return config


def vae_config(spec: VAESpec) -> dict[str, Any]:
    """Arguments of diffusers' ``AutoencoderKL``."""
    levels = len(spec.channels)
    return {
        "in_channels": spec.in_channels,
        "out_channels": spec.in_channels,
        "latent_channels": spec.latent_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": spec.channels,
        "layers_per_block": spec.layers_per_block,
        "norm_num_groups": spec.norm_groups,
        "sample_size": spec.sample_size,
        "scaling_factor": spec.scaling_factor,
    }


def clip_config(spec: TextSpec | VisionSpec) -> dict[str, Any]:
    """Arguments of transformers' ``CLIPTextConfig`` or ``CLIPVisionConfig``."""
    config: dict[str, Any] = {
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp_width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "hidden_act": spec.activation,
        "layer_norm_eps": spec.norm_eps,
    }
    if spec.projection_width:
        config["projection_dim"] = spec.projection_width
    if isinstance(spec, VisionSpec):
        return config | {"image_size": spec.image_size, "patch_size": spec.patch_size}
    return config | {
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context_length,
        "bos_token_id": spec.bos_id,
        "eos_token_id": spec.eos_id,
        "pad_token_id": spec.pad_id,
    }


def prior_config(spec: PriorSpec) -> dict[str, Any]:
    """Arguments of diffusers' ``PriorTransformer``."""
    return {
        "num_attention_heads": spec.heads,
        "attention_head_dim": spec.head_width,
        "num_layers": spec.layers,
        "embedding_dim": spec.embedding_width,
        "num_embeddings": spec.text_tokens,
        "additional_embeddings": spec.extra_tokens,
    }


def published_name(key: str) -> str:
    """transformers 5 drops ``text_model.`` from ``CLIPTextModel``'s names; files keep it."""
    flat = key.startswith(("embeddings.", "encoder.layers.", "final_layer_norm."))
    return f"text_model.{key}" if flat else key


# -- weights ------------------------------------------------------------------------------------


def blank(build: Callable[[], nn.Module]) -> nn.Module:
    """A module with uninitialised parameters: no time is spent on weights to be overwritten."""
    with torch.device("meta"):
        module = build()
    module = module.to_empty(device="cpu")
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
        elif name == "causal_attention_mask":  # the prior's, as its constructor makes it
            buffer.copy_(torch.full(buffer.shape[1:], -10000.0).triu_(1)[None])
        else:
            raise ValueError(f"{type(module).__name__} has a buffer {name} that is not set here")
    return module.eval().requires_grad_(False)


def draw(module: nn.Module, seed: int) -> None:
    """Random weights: normal, norms about one, embeddings of tokens and positions small."""
    generator = torch.Generator().manual_seed(seed)
    for name, part in module.named_modules():
        for kind, weight in part.named_parameters(recurse=False):
            weight.normal_(generator=generator)
            if isinstance(part, nn.GroupNorm | nn.LayerNorm):
                weight.mul_(0.3)
                if kind == "weight":
                    weight.add_(1.0)
            elif kind == "bias":
                weight.mul_(0.1 * part.weight[0].numel() ** 0.5)
            elif kind == "class_embedding" or name.endswith(
                ("token_embedding", "position_embedding")
            ):
                weight.mul_(QUIET)


def _targets(name: str, part: nn.Module, groups: int) -> Tensor:
    """The standard deviation wanted of each output channel."""
    channels = part.weight.shape[0]
    target = torch.ones(channels)
    if name.endswith("patch_embedding") or name.endswith("proj_in"):
        return target * QUIET
    # What adds to a feature map, or to what the second norm of a residual block reads.
    stream = ("conv", "conv_in", "conv1", "conv2", "conv_shortcut", "proj_out", "time_emb_proj")
    is_stream = name.endswith(tuple(f".{last}" for last in stream)) or name == "conv_in"
    is_stream |= name.endswith("mid_block.attentions.0.to_out.0")  # the autoencoder's
    if is_stream and groups and channels % groups == 0:
        group = torch.arange(channels) // (channels // groups)
        target[group % 4 == 3] = QUIET
    return target


@contextmanager
def scaling(module: nn.Module, groups: int) -> Iterator[None]:
    """While this runs, a forward pass scales every layer to its wanted output; see the top."""

    def hook(name: str) -> Callable[..., Tensor]:
        def scale(part: Any, _inputs: Any, output: Tensor) -> Tensor:
            factor = _targets(name, part, groups) / output.std()
            dim = 1 if isinstance(part, nn.Conv2d) else -1
            shape = [-1 if i == dim % output.ndim else 1 for i in range(output.ndim)]
            part.weight.mul_(factor.reshape(-1, *[1] * (part.weight.ndim - 1)))
            if part.bias is not None:
                part.bias.mul_(factor)
            return output * factor.reshape(shape)

        return scale

    handles = [
        part.register_forward_hook(hook(name))
        for name, part in module.named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def share(ours: nn.Module, peer: nn.Module) -> None:
    """Give ours, built on the meta device, the reference's own tensors. Names must agree."""
    state = {published_name(key): value for key, value in peer.state_dict().items()}
    ours.load_state_dict(state, strict=True, assign=True)
    ours.eval().requires_grad_(False)


def build(
    make: Callable[[], nn.Module], peer: nn.Module, *, seed: int, groups: int, passes: list[Any]
) -> nn.Module:
    """Draw the reference's weights, scale them by calling each of ``passes``, share them."""
    draw(peer, seed)
    with torch.no_grad(), scaling(peer, groups):
        for run in passes:
            run()
    with torch.device("meta"):
        ours = make()
    share(ours, peer)
    return ours


# -- comparison ---------------------------------------------------------------------------------

Reference = tuple[dict[str, Tensor], dict[str, Tensor]]


@torch.no_grad()
def record(case: Case) -> Reference:
    """The reference's taps (under our names) and ends."""
    back = {peer: ours for ours, peer in case.taps.items()}
    with taps(case.peer, case.taps.values()) as seen:
        ends = case.run_peer(case.peer, case.inputs)
    return {back[name]: value for name, value in seen.items()}, ends


class _Found(Exception):
    """The first tap that differs: nothing further is worth computing."""


@torch.no_grad()
def compare(
    case: Case, reference: Reference, *, fault: Fault | None = None, stop_at: float | None = None
) -> Comparison:
    """Run ours against what :func:`record` returned.

    Args:
        fault: plant this first; it is taken back at the end.
        stop_at: end at the first tap whose relative difference exceeds this.
    """
    seen, ends = reference
    rows: list[Row] = []

    def see(name: str, value: Tensor) -> None:
        rows.append(_row(name, value, seen[name]))
        if stop_at is not None and rows[-1].relative > stop_at:
            raise _Found

    planted = fault(case.ours, case.inputs) if fault else _no_fault(case.inputs)
    with planted as inputs, taps(case.ours, case.taps, on=see):
        try:
            outputs = case.run_ours(case.ours, inputs)
        except _Found:
            return Comparison(rows, [])
    if len(rows) != len(case.taps):
        raise ValueError(f"{case.part}: {len(rows)} of {len(case.taps)} taps ran")
    return Comparison(rows, [_row(name, outputs[name], value) for name, value in ends.items()])


@contextmanager
def _no_fault(inputs: Inputs) -> Iterator[Inputs]:
    yield inputs


def _row(name: str, ours: Tensor, peer: Tensor) -> Row:
    if ours.shape != peer.shape:
        raise ValueError(f"{name}: shape {tuple(ours.shape)}, the reference's {tuple(peer.shape)}")
    ours, peer = ours.double(), peer.double()
    std, max_abs = peer.std().item(), (ours - peer).abs().max().item()
    # A difference that is not a number must not pass a comparison with a limit.
    max_abs = max_abs if max_abs == max_abs else float("inf")
    return Row(name, std, max_abs, max_abs / max(std, 1e-30))
