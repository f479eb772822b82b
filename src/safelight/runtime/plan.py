"""Which layouts and fusions a model runs with on this machine.

Every one is exact: the same mathematics in another order, so results differ by rounding only.
The choice hangs on the model and the machine alone, never on the load of the moment, because
pictures record it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import nn

from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.runtime.kernels import library
from safelight.runtime.kernels.winograd import level
from safelight.runtime.stored import is_stored

if TYPE_CHECKING:
    from safelight.model import Model


_CHANNELS = 16
"""Inputs and outputs from which Winograd is faster."""
KEPT = 320 * 960
"""What has 64x64 cells and more in SD 1.5 at 512x512: 0.3 GB, and 0.8 GB of its decoder, for an
eighth of these layers' time."""
_COPIES = 0.3
"""What is laid out anew, as a share of the weights: SD 1.5's is 0.29."""


@dataclass(frozen=True)
class Plan:
    """The switches, each with what it saves. Without ``fused`` the others have no meaning."""

    fused: bool = True
    """Activations channels-last from end to end; GroupNorm and SiLU in one pass over memory,
    query, key and value in one product, time embeddings and the prompt's keys and values once."""
    packed: bool = True
    """Convolutions and feed-forwards by oneDNN, weights in its blocked order instead of reordered
    at each call, with what follows (residual, GELU, gate) applied where the product is written."""
    transposed: bool = True
    """Nearest 2x and a 3x3 convolution as one transposed convolution: 4 products for 9."""
    shared: bool = True
    """Branches of one picture share everything before the first cross-attention."""
    folded: bool = True
    """Small cross-attention: queries and outputs multiplied into the cached keys and values."""
    compiled: bool = True
    """Large GroupNorms, with their SiLU, by the C kernel."""
    winograd: bool = True
    """3x3 convolutions by the C kernel, with a quarter of the multiplications, and norm, SiLU, bias
    and residual inside."""
    kept: int = KEPT
    """Most weights (inputs times outputs) of such a convolution whose transformed weights are kept,
    which take four times their size. Larger ones are used where they lie, and transformed each time
    in passing: they have fewer cells, and there it costs the least, or even saves. Of linear layers
    with more weights no copy is made either."""
    halved: bool = False
    """Weights are held in float16, and made float32 layer by layer."""

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of what is on, for a picture's metadata."""
        if not self.fused:
            return ("torch",)
        names = (f.name for f in dataclasses.fields(self) if getattr(self, f.name))
        return ("torch", *sorted(names))


PLAIN = Plan(
    fused=False,
    packed=False,
    transposed=False,
    shared=False,
    folded=False,
    compiled=False,
    winograd=False,
    kept=0,
)
"""The networks as they are."""


def named(model: Model, name: str) -> Plan:
    """The plan of a name.

    Args:
        name: ``speed``, :func:`choose`; ``low-memory``, for a model whose weights are held in
            float16 (:meth:`safelight.model.Model.load` with this plan); ``reference``, the
            networks as they are.
    """
    if name == "reference":
        return dataclasses.replace(PLAIN, halved=is_stored(model.unet))
    if name == "low-memory":
        return dataclasses.replace(lean(), halved=True)
    return choose(model)


def choose(model: Model, *, others: int = 0) -> Plan:
    """The plan for a model where it is.

    Args:
        others: how many models of its size are laid out beside it.

    Float32 on the CPU is what the fusions were measured on. Elsewhere the networks run as they
    are: fewer, larger kernels matter there too, but nothing has been measured yet. Where memory is
    short, nothing is laid out anew but what is small.
    """
    known = type(model.unet) is UNet and type(model.vae) is VAE
    if not known or model.device.type != "cpu" or model.dtype != torch.float32:
        return PLAIN
    if is_stored(model.unet):
        return named(model, "low-memory")
    weights = sum(4 * p.numel() for net in (model.unet, model.vae) for p in net.parameters())
    if (1 + _COPIES) * weights * (1 + others) > _memory() / 2:
        return lean()
    return everything()


def lean() -> Plan:
    """All that works on this machine and takes next to no memory."""
    return dataclasses.replace(everything(), packed=False, transposed=False, kept=0)


def everything() -> Plan:
    """All that works on this machine."""
    return Plan(
        packed=packing_works(),
        compiled=library() is not None,
        winograd=level() > 0,
    )


def explain() -> dict[str, str]:
    """What can be on here, by the switch's name: empty, or why it is off."""
    compiled = "" if library() is not None else "the package was built without kernels"
    plain = "" if level() > 0 else "the processor has neither AVX2 nor AVX-512"
    return {
        "fused": "",
        "packed": "" if packing_works() else "this PyTorch lacks oneDNN's operations",
        "compiled": compiled,
        "winograd": compiled or plain,
    }


def by_winograd(conv: nn.Conv2d, plan: Plan) -> bool:
    """Whether a convolution is done by Winograd's. Few channels make the transforms, which
    cost the same for any number of the others, dearer than what they save."""
    outputs, inputs = conv.weight.shape[:2]
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    plain = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    return plain and plan.winograd and min(inputs, outputs) >= _CHANNELS


@functools.cache
def packing_works() -> bool:
    """Whether this PyTorch packs convolution weights, and computes right with them.

    The operations are the ones its own compiler uses for frozen weights; they are not a
    documented interface, so they are tried and compared before they are used.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight, wide, bias, other, rows, square = (
        torch.randn(shape, generator=generator)
        for shape in (
            (2, 8, 6, 6),
            (8, 8, 3, 3),
            (8, 8, 4, 4),
            (8,),
            (2, 8, 6, 6),
            (5, 8),
            (8, 8),
        )
    )
    x, other = (t.contiguous(memory_format=torch.channels_last) for t in (x, other))
    expected = F.conv2d(x, weight, bias, padding=1)
    try:
        packed = pack(weight, (1, 1), (1, 1))
        alone = packed_conv(x, packed, bias, (1, 1), (1, 1))
        added = packed_conv_add(x, other, packed, bias, (1, 1), (1, 1))
        doubled = packed_upsampling(x, pack_upsampling(wide), bias)
        packed = pack_linear(square)
        gelu = packed_linear_gelu(rows, packed, bias)
        gated = packed_linear_with(rows, rows, packed, bias, "mul")
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    close = functools.partial(torch.allclose, rtol=1e-4, atol=1e-4)
    return bool(
        close(alone, expected)
        and close(added, expected + other)
        and close(doubled, F.conv_transpose2d(x, wide, bias, stride=2, padding=1))
        and close(gelu, F.gelu(F.linear(rows, square, bias)))
        and close(gated, F.linear(rows, square, bias) * rows)
    )


# -- oneDNN, through PyTorch ----------------------------------------------------------------------

Pair = tuple[int, int]


def pack(weight: torch.Tensor, stride: Pair, padding: Pair) -> torch.Tensor:
    """A convolution's weights ``(O, I, kh, kw)`` in oneDNN's own order."""
    # The order depends little on the picture's size; another size than this one works as well.
    size = [1, weight.shape[1], 32, 32]
    op = torch.ops.mkldnn._reorder_convolution_weight
    return op(weight.detach(), [*padding], [*stride], [1, 1], 1, size)


def packed_conv(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, stride: Pair, padding: Pair
) -> torch.Tensor:
    """Convolve ``x`` (N, I, H, W) with packed weights; channels-last in and out."""
    op = torch.ops.mkldnn._convolution_pointwise
    return op(x, packed, bias, padding, stride, (1, 1), 1, "none", [], "")


def packed_conv_add(
    x: torch.Tensor,
    other: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Pair,
    padding: Pair,
) -> torch.Tensor:
    """The same plus ``other``, which has the shape and layout of the result."""
    op = torch.ops.mkldnn._convolution_pointwise.binary
    return op(x, other, packed, bias, padding, stride, (1, 1), 1, "add", 1.0, None, [], None)


def pack_upsampling(weight: torch.Tensor) -> torch.Tensor:
    """Weights ``(I, O, 4, 4)`` of a transposed convolution that doubles height and width."""
    op = torch.ops.mkldnn._reorder_convolution_transpose_weight
    size = [1, weight.shape[0], 32, 32]
    return op(weight, [1, 1], [0, 0], [2, 2], [1, 1], 1, size)


def packed_upsampling(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """That transposed convolution of ``x`` (N, I, H, W); channels-last in and out."""
    op = torch.ops.mkldnn._convolution_transpose_pointwise
    return op(x, packed, bias, (1, 1), (0, 0), (2, 2), (1, 1), 1, "none", [], "")


def pack_linear(weight: torch.Tensor) -> torch.Tensor:
    """A linear layer's weights ``(O, I)`` in oneDNN's own order, for about a thousand rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1024)


def packed_linear_gelu(
    rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The exact GELU of a linear layer over ``rows`` (N, I)."""
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "gelu", [], "none")


def packed_linear_with(
    rows: torch.Tensor,
    other: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor,
    what: Literal["add", "mul"],
) -> torch.Tensor:
    """A linear layer over ``rows`` plus, or times, ``other`` (N, O)."""
    return torch.ops.mkldnn._linear_pointwise.binary(rows, other, packed, bias, what)


def _memory() -> int:
    """Bytes of main memory; a modest guess where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 16 * 2**30
