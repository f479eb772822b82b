"""The cases of the parity check: how each network is built, fed and run in both libraries.

Every case carries the faults that the check must find, one at a time, deep in the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PriorTransformer, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from benchmarks.parity_nets import (
    Case,
    Fault,
    Inputs,
    blank,
    build,
    clip_config,
    prior_config,
    unet_config,
    vae_config,
)
from safelight.nets.attention import attend
from safelight.nets.clip import TextTower, VisionTower
from safelight.nets.prior import Prior
from safelight.nets.taps import text_taps, unet_taps, vae_taps, vision_taps
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE, SpatialAttention
from safelight.spec import PriorSpec, TextSpec, UNetSpec, VAESpec, VisionSpec

# -- faults -------------------------------------------------------------------------------------


def attribute(path: str, name: str, change: Callable[[Any], Any]) -> Fault:
    """A wrong number (or mode) in one submodule."""

    @contextmanager
    def plant(module: nn.Module, inputs: Inputs) -> Iterator[Inputs]:
        part, right = module.get_submodule(path), getattr(module.get_submodule(path), name)
        setattr(part, name, change(right))
        try:
            yield inputs
        finally:
            setattr(part, name, right)

    return plant


def method(path: str, forward: Callable[[Any, Tensor], Tensor]) -> Fault:
    """A wrong formula in one submodule."""

    @contextmanager
    def plant(module: nn.Module, inputs: Inputs) -> Iterator[Inputs]:
        part = module.get_submodule(path)
        part.forward = lambda x: forward(part, x)
        try:
            yield inputs
        finally:
            del part.forward

    return plant


def one_weight(path: str) -> Fault:
    """A single number of one weight off by 1 %: the largest, which is still one in thousands."""

    @contextmanager
    def plant(module: nn.Module, inputs: Inputs) -> Iterator[Inputs]:
        part = module.get_submodule(path)
        right = part.weight
        wrong = right.detach().clone()  # the tensor itself is the reference's too
        wrong.view(-1)[wrong.abs().argmax()] *= 1.01
        part.weight = nn.Parameter(wrong, requires_grad=False)
        try:
            yield inputs
        finally:
            part.weight = right

    return plant


def other(name: str, change: Callable[[Tensor], Tensor]) -> Fault:
    """Another input: the prompt, the picture, the class vector."""

    @contextmanager
    def plant(_module: nn.Module, inputs: Inputs) -> Iterator[Inputs]:
        yield inputs | {name: change(inputs[name])}

    return plant


def _geglu_tanh(part: Any, x: Tensor) -> Tensor:
    value, gate = part.proj(x).chunk(2, dim=-1)
    return value * F.gelu(gate, approximate="tanh")


def _two_heads(part: SpatialAttention, x: Tensor) -> Tensor:
    h = part.group_norm(x).flatten(2).transpose(1, 2)
    h = part.to_out[0](attend(part.to_q(h), part.to_k(h), part.to_v(h), heads=2))
    return x + h.transpose(1, 2).unflatten(2, x.shape[-2:])


def _tenfold(eps: float) -> float:
    # The family's two epsilons are 1e-5 and 1e-6: the one in place of the other.
    return eps * 10 if eps < 5e-6 else eps / 10


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- UNet ---------------------------------------------------------------------------------------


def unet_case(
    spec: UNetSpec,
    *,
    size: tuple[int, int],
    tokens: int = 77,
    batch: int = 2,
    timesteps: Sequence[float] = (981, 21.5),
    seed: int = 0,
) -> Case:
    """The UNet at latents of ``size``; class vector or labels and guidance embedding if it has."""
    peer = blank(lambda: UNet2DConditionModel(**unet_config(spec)))
    times = torch.tensor(timesteps[:batch])
    inputs: Inputs = {
        "x": _noise(seed + 1, batch, spec.in_channels, *size),
        "timestep": times.long() if times.equal(times.round()) else times,
        "context": _noise(seed + 2, batch, tokens, spec.context_width),
        "vector": None,
        "guidance": None,
    }
    if spec.class_embedding == "table":
        inputs["vector"] = torch.arange(batch) * 7 % spec.class_embedding_size
    elif spec.class_embedding == "projection":
        inputs["vector"] = _noise(seed + 3, batch, spec.class_embedding_size)
    if spec.guidance_embedding_size:
        inputs["guidance"] = _noise(seed + 4, batch, spec.guidance_embedding_size)

    def run_ours(module: nn.Module, given: Inputs) -> dict[str, Tensor]:
        return {"prediction": module(**given)}

    def run_peer(module: nn.Module, given: Inputs) -> dict[str, Tensor]:
        output = module(
            given["x"],
            given["timestep"],
            given["context"],
            class_labels=given["vector"],
            timestep_cond=given["guidance"],
        )
        return {"prediction": output.sample}

    ours = build(
        lambda: UNet(spec),
        peer,
        seed=seed,
        groups=spec.norm_groups,
        passes=[lambda: run_peer(peer, inputs)],
    )
    names = unet_taps(spec, layers=True)
    deep = [name for name in names if name.startswith("up_blocks") and "attentions" in name][-1]
    faults = {
        "GroupNorm eps (residual)": attribute(
            f"up_blocks.{len(spec.channels) - 1}.resnets.0.norm2", "eps", _tenfold
        ),
        "GroupNorm eps (transformer)": attribute(f"{deep}.norm", "eps", _tenfold),
        "LayerNorm eps": attribute(f"{deep}.transformer_blocks.0.norm1", "eps", _tenfold),
        "GELU kind": method(f"{deep}.transformer_blocks.0.ff.net.0", _geglu_tanh),
        "head count": attribute(f"{deep}.transformer_blocks.0.attn1", "heads", lambda n: n * 2),
        "one weight off by 1 %": one_weight(f"up_blocks.{len(spec.channels) - 1}.resnets.1.conv2"),
        "another prompt": other("context", lambda context: context.flip(0)),
        "another timestep": other("timestep", lambda t: t + 1),
    }
    if spec.class_embedding != "none":
        faults["another class"] = other("vector", lambda vector: vector.flip(0))
    if spec.guidance_embedding_size:
        faults["another guidance"] = other("guidance", lambda guidance: guidance.flip(0))
    return Case(
        "unet", ours, peer, inputs, run_ours, run_peer, {name: name for name in names}, faults
    )


# -- autoencoder --------------------------------------------------------------------------------


def vae_cases(spec: VAESpec, *, size: tuple[int, int], batch: int = 1, seed: int = 0) -> list[Case]:
    """Encoding pictures for latents of ``size``, and decoding them; one pair of networks."""
    peer = blank(lambda: AutoencoderKL(**vae_config(spec)))
    height, width = (side * spec.factor for side in size)
    noise = _noise(seed + 3, batch, spec.latent_channels, *size)
    encode: Inputs = {"pixels": _noise(seed + 1, batch, 3, height, width).tanh(), "noise": noise}
    decode: Inputs = {"latents": _noise(seed + 2, batch, spec.latent_channels, *size)}

    def encode_ours(module: nn.Module, given: Inputs) -> dict[str, Tensor]:
        posterior = module.encode(given["pixels"])
        sample = posterior.sample(given["noise"])
        return {"mean": posterior.mean, "log variance": posterior.logvar, "sample": sample}

    def encode_peer(module: nn.Module, given: Inputs) -> dict[str, Tensor]:
        posterior = module.encode(given["pixels"]).latent_dist
        sample = posterior.mean + posterior.std * given["noise"]
        return {"mean": posterior.mean, "log variance": posterior.logvar, "sample": sample}

    def decode_ours(module: nn.Module, given: Inputs) -> dict[str, Tensor]:
        return {"pixels": module.decode(given["latents"] * spec.scaling_factor)}

    def decode_peer(module: nn.Module, given: Inputs) -> dict[str, Tensor]:
        # As the published pipelines divide, so that both sides round alike.
        latents = given["latents"] * spec.scaling_factor / spec.scaling_factor
        return {"pixels": module.decode(latents).sample}

    ours = build(
        lambda: VAE(spec),
        peer,
        seed=seed,
        groups=spec.norm_groups,
        passes=[lambda: encode_peer(peer, encode), lambda: decode_peer(peer, decode)],
    )
    last = len(spec.channels) - 1

    def case(half: str, end: str, inputs: Inputs, runs: Any, faults: dict[str, Fault]) -> Case:
        names = [n for n in vae_taps(spec, layers=True) if n.startswith(half) or n == end]
        attention = f"{half}.mid_block.attentions.0"
        both = {
            "GroupNorm eps (attention)": attribute(f"{attention}.group_norm", "eps", _tenfold),
            "head count": method(attention, _two_heads),
        }
        taps = {name: name for name in names}
        return Case(f"vae {half[:-1]}", ours, peer, inputs, *runs, taps, both | faults)

    return [
        case(
            "encoder",
            "quant_conv",
            encode,
            (encode_ours, encode_peer),
            {
                "GroupNorm eps (residual)": attribute(
                    f"encoder.down_blocks.{last}.resnets.0.norm2", "eps", _tenfold
                ),
                "one weight off by 1 %": one_weight(f"encoder.down_blocks.{last}.resnets.0.conv2"),
                "symmetric padding": method(
                    "encoder.down_blocks.0.downsamplers.0",
                    lambda part, x: F.conv2d(
                        x, part.conv.weight, part.conv.bias, stride=2, padding=1
                    ),
                ),
                "another picture": other("pixels", lambda pixels: pixels.flip(-1)),
            },
        ),
        case(
            "decoder",
            "post_quant_conv",
            decode,
            (decode_ours, decode_peer),
            {
                "GroupNorm eps (residual)": attribute(
                    f"decoder.up_blocks.{last}.resnets.0.norm2", "eps", _tenfold
                ),
                "one weight off by 1 %": one_weight(f"decoder.up_blocks.{last}.resnets.0.conv2"),
                "other latents": other("latents", lambda latents: latents.flip(-1)),
            },
        ),
    ]


# -- prior --------------------------------------------------------------------------------------


def prior_case(spec: PriorSpec, *, batch: int = 2, seed: int = 0) -> Case:
    """The prior on texts of different lengths, masked where they are padded."""
    peer = blank(lambda: PriorTransformer(**prior_config(spec)))
    width, tokens = spec.embedding_width, spec.text_tokens
    inputs: Inputs = {
        "x": _noise(seed + 1, batch, width),
        "timestep": torch.tensor([961, 40])[:batch],
        "text_embedding": _noise(seed + 2, batch, width),
        "text_states": _noise(seed + 3, batch, tokens, width),
        "text_mask": torch.arange(tokens)[None] < torch.tensor([[tokens], [tokens // 4]])[:batch],
    }

    def run_ours(module: nn.Module, given: Inputs) -> dict[str, Tensor]:
        return {"embedding": module(**given)}

    def run_peer(module: nn.Module, given: Inputs) -> dict[str, Tensor]:
        output = module(
            given["x"],
            given["timestep"],
            given["text_embedding"],
            encoder_hidden_states=given["text_states"],
            attention_mask=given["text_mask"],
        )
        return {"embedding": output.predicted_image_embedding}

    ours = build(
        lambda: Prior(spec), peer, seed=seed, groups=0, passes=[lambda: run_peer(peer, inputs)]
    )
    names = [f"transformer_blocks.{i}" for i in range(spec.layers)]
    last = names[-1]
    faults = {
        "LayerNorm eps": attribute(f"{names[0]}.norm1", "eps", lambda eps: eps * 100),
        "GELU kind": method(
            f"{last}.ff.net.0", lambda part, x: F.gelu(part.proj(x), approximate="tanh")
        ),
        "head count": attribute(f"{last}.attn1", "heads", lambda heads: heads // 2),
        "one weight off by 1 %": one_weight(f"{last}.attn1.to_out.0"),
        "no mask": other("text_mask", torch.ones_like),
        "another timestep": other("timestep", lambda t: t + 1),
        "another prompt": other("text_states", lambda states: states.flip(0)),
    }
    taps = {name: name for name in names}
    return Case("prior", ours, peer, inputs, run_ours, run_peer, taps, faults)


# -- towers -------------------------------------------------------------------------------------


def text_case(spec: TextSpec, *, batch: int = 2, skip: int = 0, seed: int = 0) -> Case:
    """The text tower on random ids that end, and are padded, at different places.

    Args:
        skip: layers left out at the end, then the final norm (diffusers' ``clip_skip``).
    """
    kind = CLIPTextModelWithProjection if spec.projection_width else CLIPTextModel
    peer = blank(lambda: kind(CLIPTextConfig(**clip_config(spec))))
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(3, spec.bos_id, (batch, spec.context_length), generator=generator)
    ids[:, 0] = spec.bos_id
    for i, row in enumerate(ids):
        end = spec.context_length // (i + 2)
        row[end:] = spec.pad_id
        row[end] = spec.eos_id
    tower = "text_model." if spec.projection_width else ""
    flat = all(not name.startswith("text_model") for name, _ in peer.named_modules())
    prefix = "" if flat else "text_model."

    def run_ours(module: nn.Module, given: Inputs) -> dict[str, Tensor]:
        output = module(given["ids"], skip=skip)
        return {k: v for k, v in output._asdict().items() if v is not None}

    def run_peer(module: nn.Module, given: Inputs) -> dict[str, Tensor]:
        output = module(given["ids"], output_hidden_states=True)
        states = output.last_hidden_state
        if skip:
            norm = module.get_submodule(f"{prefix}final_layer_norm")
            return {"states": norm(output.hidden_states[-1 - skip])}
        if spec.projection_width:
            inner = module.get_submodule(tower.rstrip("."))(given["ids"])
            return {
                "states": states,
                "pooled": inner.pooler_output,
                "embedding": output.text_embeds,
            }
        return {"states": states, "pooled": output.pooler_output}

    ours = build(
        lambda: TextTower(spec),
        peer,
        seed=seed,
        groups=0,
        passes=[lambda: peer(ids)],
    )
    left_out = tuple(f"text_model.encoder.layers.{spec.layers - 1 - i}" for i in range(skip))
    names = [
        name
        for name in text_taps(spec, layers=True)
        if name not in left_out and not name.startswith(tuple(f"{part}." for part in left_out))
    ]
    layer = f"text_model.encoder.layers.{spec.layers - 1 - skip}"
    faults = _tower_faults(layer, spec) | {
        "LayerNorm eps": attribute("text_model.encoder.layers.0.layer_norm1", "eps", _tenfold),
        "no causal mask": attribute(f"{layer}.self_attn", "causal", lambda causal: not causal),
        "another prompt": other("ids", lambda ids: ids.flip(0)),
    }
    taps = {name: name if not flat else name.removeprefix("text_model.") for name in names}
    return Case("text", ours, peer, {"ids": ids}, run_ours, run_peer, taps, faults)


def vision_case(spec: VisionSpec, *, batch: int = 1, seed: int = 0) -> Case:
    """The vision tower and its projection on random pictures."""
    peer = blank(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**clip_config(spec))))
    pixels = _noise(seed + 1, batch, 3, spec.image_size, spec.image_size)

    def run_ours(module: nn.Module, given: Inputs) -> dict[str, Tensor]:
        return module(given["pixels"])._asdict()

    def run_peer(module: nn.Module, given: Inputs) -> dict[str, Tensor]:
        output = module(given["pixels"])
        states = output.last_hidden_state
        pooled = module.vision_model.post_layernorm(states[:, 0])
        return {"states": states, "pooled": pooled, "embedding": output.image_embeds}

    ours = build(
        lambda: VisionTower(spec),
        peer,
        seed=seed,
        groups=0,
        passes=[lambda: peer(pixels)],
    )
    faults = _tower_faults(f"vision_model.encoder.layers.{spec.layers - 1}", spec) | {
        "LayerNorm eps": attribute("vision_model.pre_layrnorm", "eps", _tenfold),
        "another picture": other("pixels", lambda pixels: pixels.flip(-1)),
    }
    names = vision_taps(spec, layers=True)
    return Case(
        "vision",
        ours,
        peer,
        {"pixels": pixels},
        run_ours,
        run_peer,
        {name: name for name in names},
        faults,
    )


def _tower_faults(layer: str, spec: TextSpec | VisionSpec) -> dict[str, Fault]:
    swap = {"gelu": "quick_gelu", "quick_gelu": "gelu"}
    return {
        "GELU kind": attribute(f"{layer}.mlp", "activation", swap.__getitem__),
        "head count": attribute(f"{layer}.self_attn", "heads", lambda heads: heads // 2),
        "one weight off by 1 %": one_weight(f"{layer}.mlp.fc2"),
    }
