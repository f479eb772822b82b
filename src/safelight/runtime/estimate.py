"""Memory of a request on a CPU, predicted from a model's spec before anything is read.

Weights and their other layouts are counted from the networks on the meta device. Activations are
counted too: the plain networks run on the meta device, where tensors have sizes but no contents,
while the bytes that are alive are added up. What this machine's libraries take beside that (blocked
copies inside convolutions, what the allocator keeps) is a factor and a base, which
``python -m benchmarks.memory --fit`` measures.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safelight.nets.attention import Attention, FeedForward
from safelight.nets.layers import Upsample
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE, SpatialAttention
from safelight.parts import builders
from safelight.runtime.plan import Plan
from safelight.spec import ModelSpec, UNetSpec, VAESpec


class Fit(NamedTuple):
    """What is measured: bytes that are there before a model is, and how much of activations is
    resident at the peak for each byte that the plain networks keep alive."""

    base: float
    unet: float
    decoder: float


# Fitted on eight cases of `tiny`, 128² and 512², one picture and eight: within 9 %. Published sizes
# have not been measured yet.
FUSED = Fit(base=288 * 2**20, unet=1.2, decoder=2.3)
PLAIN = Fit(base=277 * 2**20, unet=1.1, decoder=2.3)


@dataclass(frozen=True)
class Estimate:
    """Bytes, by what they are for."""

    base: int
    """Python, torch and this package."""
    weights: int
    """Of the networks that a picture needs, in float32, mapped pages included."""
    layouts: int
    """What the plan holds of them in another layout."""
    unet: int
    """Activations of one network call."""
    decoder: int
    """Activations of decoding one picture."""
    pictures: int
    """Latents and pixels of all pictures."""

    @property
    def peak(self) -> int:
        """The most that is resident at once: the UNet and the decoder take turns."""
        turns = max(self.unet, self.decoder)
        return self.base + self.weights + self.layouts + turns + self.pictures


def estimate(
    spec: ModelSpec,
    *,
    width: int,
    height: int,
    count: int = 1,
    together: int = 1,
    guided: bool = True,
    plan: Plan,
    fit: Fit | None = None,
) -> Estimate:
    """What pictures of one request take, in float32.

    Args:
        width, height: in pixels.
        count: pictures of the request.
        together: pictures that share a network call.
        guided: with a branch for the empty prompt.
        plan: how the networks are laid out.
        fit: other constants than the measured ones.
    """
    fit = fit or (FUSED if plan.fused else PLAIN)
    factor, rows = spec.vae.factor, min(count, together) * (2 if guided else 1)
    cells = (-(-height // factor), -(-width // factor))
    held, more = weights(spec, plan)
    call = rows * unet_activations(spec.unet, *cells) if rows else 0
    pixels = 3 * width * height
    latents = 4 * spec.vae.latent_channels * cells[0] * cells[1]
    return Estimate(
        base=int(fit.base),
        weights=held,
        layouts=more,
        unet=int(fit.unet * call),
        decoder=int(fit.decoder * decoder_activations(spec.vae, *cells)),
        pictures=count * (pixels + 4 * latents),
    )


def weights(spec: ModelSpec, plan: Plan) -> tuple[int, int]:
    """Bytes of the networks in float32, and of what a plan copies of them.

    The encoder of a text-to-image model is mapped and never read: it is left out.
    """
    with torch.device("meta"):
        nets = {part: build() for part, build in builders(spec).items()}
    read = [net for part, net in nets.items() if part not in ("vae", "vision")]
    vae: Any = nets["vae"]
    read += [vae.decoder, vae.post_quant_conv]
    if spec.family != "sd-v1" and spec.family != "sd-v2":
        read += [vae.encoder, *(net for part, net in nets.items() if part == "vision")]
    held = sum(_bytes(net) for net in read)
    return held, _copied(nets["unet"], plan) + _copied(vae.decoder, plan) if plan.fused else 0


def _copied(net: nn.Module, plan: Plan) -> int:
    total = 0
    inside = {id(part.conv) for part in net.modules() if isinstance(part, Upsample)}
    for part in net.modules():
        if isinstance(part, nn.Conv2d) and part.kernel_size != (1, 1):
            wider = id(part) in inside and plan.transposed
            total += 4 * part.weight.numel() * 16 // 9 if wider else 4 * part.weight.numel()
        elif isinstance(part, Attention | SpatialAttention):
            same = isinstance(part, SpatialAttention) or (
                part.to_q.in_features == part.to_k.in_features
            )
            total += 4 * 3 * part.to_q.weight.numel() if same else 0
        elif isinstance(part, FeedForward) and plan.packed:
            total += _bytes(part)
    return total


def _bytes(net: nn.Module) -> int:
    return sum(4 * weight.numel() for weight in net.parameters())


def unet_activations(spec: UNetSpec, height: int, width: int) -> int:
    """Most bytes alive in one row of a network call, of ``height`` by ``width`` cells."""
    return _unet(spec.model_dump_json(), height, width)


def decoder_activations(spec: VAESpec, height: int, width: int) -> int:
    """Most bytes alive while a picture of ``height`` by ``width`` cells is decoded."""
    return _decoder(spec.model_dump_json(), height, width)


@functools.lru_cache(256)
def _unet(told: str, height: int, width: int) -> int:
    spec = UNetSpec.model_validate_json(told)
    with torch.device("meta"):
        net = UNet(spec)
        x = torch.empty(1, spec.in_channels, height, width)
        tokens = torch.empty(1, 77, spec.context_width)
        vector = None
        if spec.class_embedding == "table":
            vector = torch.empty(1, dtype=torch.long)
        elif spec.class_embedding == "projection":
            vector = torch.empty(1, spec.class_embedding_size)
        wide = spec.guidance_embedding_size
        guidance = torch.empty(1, wide) if wide else None
        return _alive(lambda: net(x, torch.empty(1), tokens, vector, guidance))


@functools.lru_cache(256)
def _decoder(told: str, height: int, width: int) -> int:
    spec = VAESpec.model_validate_json(told)
    with torch.device("meta"):
        net = VAE(spec)
        latents = torch.empty(1, spec.latent_channels, height, width)
        return _alive(lambda: net.decode(latents))


def _alive(call: Callable[[], object]) -> int:
    """Most bytes of new tensors that are alive at once while ``call`` runs on the meta device."""
    with torch.no_grad(), _Flat(), _Living() as living:
        call()
    return living.peak


class _Living(TorchDispatchMode):
    """Adds up the storages that operations make, until nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mine = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        answer = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(answer):
            if _is_tensor(tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known and id(storage) not in mine:
                    self._see(storage)
        return answer

    def _see(self, storage: Any) -> None:
        name, size = id(storage), storage.nbytes()
        self._known.add(name)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, name, size)

    def _gone(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


class _Flat(TorchFunctionMode):
    """Attention without its scores, as the CPU's own kernel computes it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _key, value = args[:3]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
