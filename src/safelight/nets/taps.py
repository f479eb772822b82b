"""Feature taps: read what named submodules put out, without touching the networks.

For distillation (block-wise feature losses, as Kim et al. 2023, 2305.15798, equation 3) and for
parity, where two networks are compared tap by tap. The name lists are in the order in which the
layers run, and hold for the published networks of the same key names too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from safelight.spec import TextSpec, UNetSpec, VAESpec, VisionSpec


@contextmanager
def taps(
    module: nn.Module,
    names: Iterable[str],
    *,
    on: Callable[[str, Tensor], None] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of named submodules while the block runs.

    ::

        with taps(unet, unet_taps(unet.spec)) as seen:
            unet(x, t, context)
        loss = (seen["mid_block"] - other["mid_block"]).square().mean()

    Gradients flow through what is collected. A submodule that runs twice keeps its last output.
    Where a submodule puts out several things, the first is taken. Compiled regions and captured
    graphs run no hooks: tap the module as it was built.

    Args:
        names: dotted paths of submodules, in any order; "" is the module itself.
        on: called with every (name, output) as it appears; then nothing is collected.

    Raises:
        KeyError: names that the module does not have.
    """
    parts = dict(module.named_modules())
    names = list(dict.fromkeys(names))
    if unknown := [name for name in names if name not in parts]:
        raise KeyError(f"{type(module).__name__} has no submodules {', '.join(unknown)}")
    seen: dict[str, Tensor] = {}
    report = on or seen.__setitem__

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: report(name, _first(output))

    handles = [parts[name].register_forward_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def unet_taps(spec: UNetSpec, *, layers: bool = False) -> list[str]:
    """The blocks of a UNet: ``down_blocks.i``, ``mid_block``, ``up_blocks.i``.

    Each puts out ``(N, channels, height, width)``; a down block's output is after its
    downsampling, an up block's after its upsampling.

    Args:
        layers: every layer inside the blocks too, and the embeddings and convolutions around.
    """
    levels, last = len(spec.channels), len(spec.channels) - 1
    names: list[str] = []
    for i in range(levels):
        inner = _pairs(spec.layers_per_block, spec.attention[i])
        inner += ["downsamplers.0"] if i < last else []
        names += _block(f"down_blocks.{i}", inner, layers)
    names += _block("mid_block", ["resnets.0", "attentions.0", "resnets.1"], layers)
    for i in range(levels):
        inner = _pairs(spec.layers_per_block + 1, spec.attention[last - i])
        inner += ["upsamplers.0"] if i < last else []
        names += _block(f"up_blocks.{i}", inner, layers)
    if not layers:
        return names
    embeddings = ["time_embedding"] + ["class_embedding"] * (spec.class_embedding != "none")
    return [*embeddings, "conv_in", *names, "conv_norm_out", "conv_out"]


def vae_taps(spec: VAESpec, *, layers: bool = False) -> list[str]:
    """The blocks of an autoencoder, encoder first; ``(N, channels, height, width)`` each.

    Args:
        layers: as for :func:`unet_taps`. The two mid-block attentions count as layers.
    """
    last = len(spec.channels) - 1
    middle = ["resnets.0", "attentions.0", "resnets.1"]
    encoder: list[str] = []
    decoder = _block("decoder.mid_block", middle, layers)
    for i in range(last + 1):
        inner = _pairs(spec.layers_per_block, False) + ["downsamplers.0"] * (i < last)
        encoder += _block(f"encoder.down_blocks.{i}", inner, layers)
        inner = _pairs(spec.layers_per_block + 1, False) + ["upsamplers.0"] * (i < last)
        decoder += _block(f"decoder.up_blocks.{i}", inner, layers)
    encoder += _block("encoder.mid_block", middle, layers)
    if layers:
        ends = ["conv_norm_out", "conv_out"]
        encoder = ["encoder.conv_in", *encoder, *(f"encoder.{e}" for e in ends), "quant_conv"]
        decoder = ["post_quant_conv", "decoder.conv_in", *decoder, *(f"decoder.{e}" for e in ends)]
    return encoder + decoder


def text_taps(spec: TextSpec, *, layers: bool = False) -> list[str]:
    """The layers of a text tower; ``(N, L, width)`` each.

    Args:
        layers: the embeddings, both halves of every layer and the final norm too.
    """
    names = _tower("text_model", spec, layers)
    return [*names, "text_model.final_layer_norm"] if layers else names


def vision_taps(spec: VisionSpec, *, layers: bool = False) -> list[str]:
    """The layers of a vision tower; ``(N, 1 + patches, width)`` each.

    Args:
        layers: as for :func:`text_taps`; the last norm puts out ``(N, width)``.
    """
    names = _tower("vision_model", spec, layers)
    if not layers:
        return names
    names.insert(1, "vision_model.pre_layrnorm")
    return [*names, "vision_model.post_layernorm", "visual_projection"]


def _tower(prefix: str, spec: TextSpec | VisionSpec, layers: bool) -> list[str]:
    names = [f"{prefix}.embeddings"] if layers else []
    for i in range(spec.layers):
        names += _block(f"{prefix}.encoder.layers.{i}", ["self_attn", "mlp"], layers)
    return names


def _pairs(count: int, attention: bool) -> list[str]:
    kinds = ("resnets", "attentions") if attention else ("resnets",)
    return [f"{kind}.{j}" for j in range(count) for kind in kinds]


def _block(name: str, inner: list[str], layers: bool) -> list[str]:
    return [*(f"{name}.{part}" for part in inner if layers), name]
