"""Low-rank adapters: attached for a while or merged into new weights, never into shared ones.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (2106.09685), section 4.1:
``W x + (alpha / r) B A x`` with A ("down") of r rows and B ("up") of r columns. For a k x k
convolution A is k x k and B is 1 x 1, as kohya's files and LoCon have it.

An adapter belongs to a request. :func:`attach` adds it by forward hooks while it lasts and
touches no weight, so detaching restores the network bit by bit; :func:`merge` returns a second
module that shares every tensor except the changed ones. Files are read in
:mod:`safelight.nets.lora_keys`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""What text-to-image LoRA training adapts in a UNet."""
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The same in a CLIP tower."""


class Pair(NamedTuple):
    """The two factors for one layer."""

    down: Tensor
    """``(rank, in)``, for a convolution ``(rank, in, k, k)``."""
    up: Tensor
    """``(out, rank)``, for a convolution ``(out, rank, 1, 1)``."""
    alpha: float
    """The layer changes by ``alpha / rank`` times the product."""

    @property
    def rank(self) -> int:
        """Rows of ``down``."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter for one network: a pair of factors for each adapted layer's path."""

    pairs: Mapping[str, Pair]

    def parameters(self) -> Iterator[Tensor]:
        """Every factor, for an optimiser."""
        for pair in self.pairs.values():
            yield pair.down
            yield pair.up

    def to(self, *args: Any, **kwargs: Any) -> Adapter:
        """A copy on another device or in another dtype, as :meth:`torch.Tensor.to`."""
        return Adapter(
            {
                path: Pair(pair.down.to(*args, **kwargs), pair.up.to(*args, **kwargs), pair.alpha)
                for path, pair in self.pairs.items()
            }
        )


Use = tuple[Adapter, float | Tensor]
"""An adapter and its multiplier: one number, or ``(N,)`` with one a row of the batch, so that
requests with different adapters can share a call (a row with 0 is left as it is)."""


# -- fitting ------------------------------------------------------------------------------------


def layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that can be adapted, by path."""
    return {
        path: part
        for path, part in module.named_modules()
        if isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups == 1)
    }


def fit(pair: Pair, layer: nn.Linear | nn.Conv2d) -> Pair:
    """The pair in its layer's rank: v1 projects by 1x1 convolutions, v2 by linear layers, and
    files made for one serve the other.

    Raises:
        ValueError: the shapes are another layer's.
    """
    down, up = pair.down, pair.up
    if isinstance(layer, nn.Linear):
        wanted_down, wanted_up = (pair.rank, layer.in_features), (layer.out_features, pair.rank)
    else:
        wanted_down = (pair.rank, layer.in_channels, *layer.kernel_size)
        wanted_up = (layer.out_channels, pair.rank, 1, 1)
    # Only trailing ones may come or go, so a reshape moves no number.
    if _core(down) != _core_shape(wanted_down) or _core(up) != _core_shape(wanted_up):
        raise ValueError(
            f"the factors are {tuple(down.shape)} and {tuple(up.shape)}, "
            f"but the layer needs {wanted_down} and {wanted_up}"
        )
    # The very tensor where it fits: a view would not follow a parameter whose data is replaced
    # (DistributedDataParallel does).
    if down.shape != wanted_down:
        down = down.reshape(wanted_down)
    return Pair(down, up if up.shape == wanted_up else up.reshape(wanted_up), pair.alpha)


def _core(tensor: Tensor) -> tuple[int, ...]:
    return _core_shape(tuple(tensor.shape))


def _core_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] in ((), (1, 1)) else shape


def _fitted(module: nn.Module, adapter: Adapter) -> dict[str, Pair]:
    adaptable = layers(module)
    if unknown := sorted(set(adapter.pairs) - set(adaptable)):
        raise ValueError(
            f"the adapter changes layers that {type(module).__name__} does not have: "
            + ", ".join(unknown)
        )
    pairs = {}
    for path, pair in adapter.pairs.items():
        try:
            pairs[path] = fit(pair, adaptable[path])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return pairs


# -- while it lasts -----------------------------------------------------------------------------


class _Addition:
    """A forward hook that adds one layer's low-rank terms to its output."""

    def __init__(self) -> None:
        self.terms: list[tuple[Pair, float | Tensor]] = []

    def __call__(self, layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        x = inputs[0]
        for pair, multiplier in self.terms:
            down, up = pair.down.to(x.dtype), pair.up.to(x.dtype)
            if isinstance(layer, nn.Linear):
                hidden = F.linear(x, down)
            else:
                hidden = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
            scale = multiplier * pair.scale
            if isinstance(scale, Tensor):
                scale = scale.to(x).reshape(-1, *[1] * (x.ndim - 1))
            hidden = hidden * scale
            # Not in place: the layer's output may be wanted by a tap.
            output = output + (
                F.linear(hidden, up) if isinstance(layer, nn.Linear) else F.conv2d(hidden, up)
            )
        return output


class Attachment:
    """Adapters that act until :meth:`detach`, or to the end of a ``with`` block."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def detach(self) -> None:
        """The network is what it was, bit by bit. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(module: nn.Module, uses: Iterable[Use]) -> Attachment:
    """Let adapters act on a network.

    Their contributions add up. Weights stay as they are, gradients reach the factors, and
    factors that change (training) act as they are at each call. Whoever else calls this very
    module meanwhile meets the adapters too: a loaded model's networks belong to one thread (the
    engine's); otherwise attach to a :func:`view`.

    ::

        with attach(unet, [(style, 0.8), (subject, 1.0)]):
            prediction = unet(x, t, context)

    Raises:
        ValueError: a layer that the network does not have, or of another shape; nothing is
            attached then.
    """
    adaptable = layers(module)
    additions: dict[str, _Addition] = {}
    for adapter, multiplier in uses:
        for path, pair in _fitted(module, adapter).items():
            weight = adaptable[path].weight
            if not (pair.down.requires_grad or pair.up.requires_grad):
                # Once here instead of at every call. What trains keeps its own dtype.
                down, up = (t.to(weight.device, weight.dtype) for t in pair[:2])
                pair = Pair(down, up, pair.alpha)
            additions.setdefault(path, _Addition()).terms.append((pair, multiplier))
    return Attachment([adaptable[p].register_forward_hook(a) for p, a in additions.items()])


# -- for good, elsewhere ------------------------------------------------------------------------


def view(module: nn.Module) -> nn.Module:
    """A second module over the same tensors, without the first one's attached adapters.

    What is attached to it, or replaced in it, does not show in the first; it costs no weights.
    """
    shared = {id(t): t for t in itertools.chain(module.parameters(), module.buffers())}
    twin = copy.deepcopy(module, shared)
    for part in twin.modules():
        hooks = part._forward_hooks
        for key in [k for k, hook in hooks.items() if isinstance(hook, _Addition)]:
            del hooks[key]
    return twin


def deltas(module: nn.Module, uses: Iterable[Use]) -> dict[str, Tensor]:
    """What the adapters together add to each layer's weight, in float32, by the layer's path.

    Raises:
        ValueError: as :func:`attach`; or a multiplier a row, which no single weight can hold.
    """
    found: dict[str, Tensor] = {}
    for adapter, multiplier in uses:
        if isinstance(multiplier, Tensor) and multiplier.numel() != 1:
            raise ValueError("weights cannot be merged with a multiplier for each row")
        for path, pair in _fitted(module, adapter).items():
            down, up = pair.down.detach().float(), pair.up.detach().float()
            product = up.flatten(1) @ down.flatten(1)
            product = product.reshape(up.shape[0], *down.shape[1:]) * (
                float(multiplier) * pair.scale
            )
            found[path] = found[path] + product if path in found else product
    return found


def merge(module: nn.Module, uses: Iterable[Use]) -> nn.Module:
    """A second module with the adapters inside its weights; ``module`` is left as it is.

    It runs at the plain network's speed and shares every tensor that no adapter changes. The sum
    is rounded once to each weight's dtype.
    """
    merged = view(module)
    for path, delta in deltas(module, uses).items():
        layer = merged.get_submodule(path)
        old: nn.Parameter = layer.weight  # pyright: ignore[reportAssignmentType]
        new = (old.detach().float() + delta.to(old.device)).to(old.dtype)
        layer.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    return merged


# -- for training -------------------------------------------------------------------------------


def targets(module: nn.Module, endings: Iterable[str]) -> list[str]:
    """Paths of the adaptable layers that end like this, e.g. :data:`UNET_ATTENTION`."""
    endings = tuple(endings)
    return [
        path
        for path in layers(module)
        if any(path == ending or path.endswith(f".{ending}") for ending in endings)
    ]


def fresh(
    module: nn.Module,
    paths: Iterable[str],
    *,
    rank: int = 4,
    alpha: float | None = None,
    generator: torch.Generator | None = None,
) -> Adapter:
    """A new, trainable adapter in float32 that changes nothing yet.

    ``down`` is uniform in ``±1 / sqrt(fan in)`` (kohya's and PEFT's start), ``up`` is zero.

    Args:
        alpha: None for ``rank``, so that the product counts as it is.
    """
    adaptable, pairs = layers(module), {}
    for path in paths:
        layer = adaptable[path]
        weight = layer.weight
        bound = weight[0].numel() ** -0.5
        down = torch.rand((rank, *weight.shape[1:]), generator=generator) * 2 * bound - bound
        up = torch.zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2))
        down, up = down.to(weight.device), up.to(weight.device)
        pairs[path] = Pair(
            down.requires_grad_(), up.requires_grad_(), float(rank if alpha is None else alpha)
        )
    return Adapter(pairs)
