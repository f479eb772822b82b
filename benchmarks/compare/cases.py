"""What is measured: models, cases, and what each costs in arithmetic, time and memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from safelight import presets
from safelight.spec import ModelSpec, TextSpec, UNetSpec, VAESpec

OURS = "safelight"
EAGER = "diffusers"
SIDES = {
    OURS: "Safelight as it comes",
    EAGER: "diffusers, eager",
    "diffusers-compile": "diffusers, torch.compile, channels-last, frozen weights",
    "openvino": "OpenVINO, static shapes, LATENCY, float32",
    "onnxruntime": "ONNX Runtime, static shapes, float32",
    "sd.cpp": "stable-diffusion.cpp, float32 file",
    "sd.cpp-q8": "stable-diffusion.cpp, q8_0",
}
"""Every side, ours first; the second is what all others must agree with."""

KINDS = ("step", "decode", "encode", "picture", "start")
"""``start``: a process of its own, from the command to the first guided step."""

PICTURE_STEPS, GUIDANCE = 20, 7.5

MICRO = ModelSpec(
    name="micro",
    unet=UNetSpec(
        sample_size=8,
        channels=(32, 64),
        attention=(True, True),
        heads=(2, 2),
        only_cross_attention=(False, False),
        layers_per_block=1,
        context_width=32,
        norm_groups=8,
    ),
    vae=VAESpec(channels=(16, 32), layers_per_block=1, sample_size=16, norm_groups=8),
    text=TextSpec(
        vocab_size=1000, width=32, layers=1, heads=2, mlp_width=64, bos_id=998, eos_id=999,
        pad_id=999,
    ),
)  # fmt: skip
"""For ``--smoke``: every exporter in seconds."""

MODELS: dict[str, ModelSpec] = {
    "sd15": presets.SD_V1.replace(name="sd15"),
    "sd21": presets.SD_V2_768.replace(name="sd21"),
    "small": presets.SD_SMALL,
    "tiny": presets.TINY,
    "micro": MICRO,
}
TITLES = {
    "sd15": "SD 1.5, published size, random weights",
    "sd21": "SD 2.1, published size, random weights",
    "small": "Small SD, published size, random weights",
    "tiny": "tiny, the shipped weights",
    "micro": "micro, a rehearsal",
}


@dataclass(frozen=True)
class Case:
    """One row's worth of work, the same for every side."""

    model: str
    kind: str
    size: int
    """Pixels a side."""
    batch: int = 1
    """Pictures; a guided step has two rows for each."""
    steps: int = PICTURE_STEPS

    @property
    def key(self) -> str:
        """Its name in files and on the command line."""
        many = f"-x{self.batch}" if self.batch > 1 else ""
        return f"{self.model}-{self.kind}-{self.size}{many}"

    @property
    def title(self) -> str:
        """Its name in tables."""
        kind = {
            "step": "guided step",
            "decode": "VAE decode",
            "encode": "VAE encode",
            "picture": f"{self.steps}-step picture",
            "start": "cold start to the first step",
        }[self.kind]
        many = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{kind}, {self.size}²{many}"

    @property
    def spec(self) -> ModelSpec:
        """The model's."""
        return MODELS[self.model]

    def json(self) -> dict[str, Any]:
        """For the worker's pipe."""
        return asdict(self)


def every() -> list[Case]:
    """All cases, the most telling first: a budget keeps the head of this list."""
    big = [
        Case("sd15", "step", 512),
        Case("sd15", "decode", 512),
        Case("sd15", "start", 512),
        Case("tiny", "step", 128),
        Case("tiny", "picture", 128),
        Case("tiny", "picture", 128, 4),
        Case("tiny", "decode", 128),
        Case("tiny", "encode", 128),
        Case("tiny", "step", 128, 4),
        Case("tiny", "start", 128),
        Case("sd15", "step", 256),
        Case("sd15", "encode", 512),
        Case("sd15", "picture", 512),
        Case("sd15", "step", 768),
        Case("small", "step", 512),
        Case("sd21", "step", 768),
        Case("sd15", "step", 256, 4),
        Case("sd15", "decode", 256),
        Case("sd15", "encode", 256),
        Case("sd21", "step", 512),
        Case("sd21", "step", 256),
        Case("small", "step", 256),
        Case("small", "step", 768),
        Case("sd15", "step", 512, 4),
        Case("sd15", "decode", 768),
        Case("sd15", "encode", 768),
        Case("sd15", "decode", 256, 4),
        Case("sd21", "start", 768),
        Case("small", "start", 512),
        Case("small", "picture", 512),
        Case("sd21", "picture", 768),
        Case("sd15", "picture", 512, 4),
    ]
    return big


def smoke() -> list[Case]:
    """A rehearsal of every kind at micro size."""
    rest = [Case("micro", kind, 16) for kind in KINDS if kind != "picture"]
    return [*rest, Case("micro", "step", 16, 4), Case("micro", "picture", 16, steps=3)]


def choose(
    *,
    models: Sequence[str] = (),
    kinds: Sequence[str] = (),
    sizes: Sequence[int] = (),
    batches: Sequence[int] = (),
    keys: Sequence[str] = (),
    rehearsal: bool = False,
) -> list[Case]:
    """The cases that the command line asks for, in order of what they tell.

    ``keys`` may name cases that are not in the list, in the same spelling.
    """
    found = [
        case
        for case in (smoke() if rehearsal else every())
        if (not models or case.model in models)
        and (not kinds or case.kind in kinds)
        and (not sizes or case.size in sizes)
        and (not batches or case.batch in batches)
    ]
    return [parse(key) for key in keys] or found


def parse(key: str) -> Case:
    """A case from its key: ``sd15-step-512``, ``tiny-picture-128-x4``.

    Raises:
        ValueError: it names none.
    """
    words = key.split("-")
    try:
        model, kind, size, *more = words
        batch = int(more[0].removeprefix("x")) if more else 1
        case = Case(model, kind, int(size), batch)
    except ValueError:
        raise ValueError(f"{key!r} names no case: MODEL-KIND-SIZE[-xBATCH]") from None
    if model not in MODELS or kind not in KINDS or len(more) > 1:
        raise ValueError(f"{key!r}: models are {', '.join(MODELS)}; kinds {', '.join(KINDS)}")
    if case.size % case.spec.vae.factor or case.size <= 0 or batch < 1:
        raise ValueError(f"{key!r}: the size must be a multiple of {case.spec.vae.factor}")
    return case


# -- what it costs --------------------------------------------------------------------------------


def flops(case: Case) -> float:
    """Arithmetic of the networks as they are written: two for a product and its sum.

    Whoever needs less (Safelight's transposed convolutions, Winograd) shows a higher share of the
    machine's rate, above 1 even.
    """
    step = 2 * case.batch * _unet_flops(case.model, case.size)
    if case.kind in ("step", "start"):
        return step
    coded = case.batch * _vae_flops(case.model, case.size, case.kind == "encode")
    return coded + (case.steps * step if case.kind == "picture" else 0)


def words(spec: ModelSpec) -> int:
    """Tokens of a prompt."""
    return 77 if spec.text is None else spec.text.context_length


@functools.cache
def _unet_flops(model: str, size: int) -> float:
    import torch

    from safelight.nets.unet import UNet

    spec = MODELS[model]
    cells = size // spec.vae.factor
    with torch.device("meta"):
        net = UNet(spec.unet)
        x = torch.empty(1, spec.unet.in_channels, cells, cells)
        t, context = torch.empty(1), torch.empty(1, words(spec), spec.unet.context_width)
    return _counted(lambda: net(x, t, context))


@functools.cache
def _vae_flops(model: str, size: int, encode: bool) -> float:
    import torch

    from safelight.nets.vae import VAE

    spec = MODELS[model].vae
    cells = size // spec.factor
    with torch.device("meta"):
        net = VAE(spec)
        pixels = torch.empty(1, 3, size, size)
        latents = torch.empty(1, spec.latent_channels, cells, cells)
    return _counted(lambda: net.encode(pixels) if encode else net.decode(latents))


def _counted(call: Any) -> float:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


@functools.cache
def weights_gib(model: str) -> float:
    """Of a model's networks in float32."""
    import torch

    from safelight.parts import builders

    with torch.device("meta"):
        nets = [build() for build in builders(MODELS[model]).values()]
    return sum(4 * p.numel() for net in nets for p in net.parameters()) / 2**30


SHARE = {"diffusers": 0.6, "diffusers-compile": 0.55, "openvino": 0.65, "onnxruntime": 0.5,
         "sd.cpp": 0.07, "sd.cpp-q8": 0.07, OURS: 0.8}  # fmt: skip
"""Of the machine's matrix rate that a side reaches, for estimates only."""
READY = {"diffusers": 8, "diffusers-compile": 170, "openvino": 100, "onnxruntime": 180,
         "sd.cpp": 15, "sd.cpp-q8": 15, OURS: 12}  # fmt: skip
"""Seconds to export, load and compile a model of 4 GiB."""
COPIES = {"diffusers": 1.0, "diffusers-compile": 2.1, "openvino": 2.2, "onnxruntime": 2.2,
          "sd.cpp": 1.1, "sd.cpp-q8": 0.6, OURS: 2.0}  # fmt: skip
"""Times its weights that a side holds."""


def activations_gib(case: Case) -> float:
    """A rough guess of a side's activations: the largest feature maps of the autoencoder, or the
    UNet's finest level with its feed-forward."""
    cells = (case.size / case.spec.vae.factor) ** 2
    unet = 2 * case.batch * cells * case.spec.unet.channels[0] * 24
    pixels = case.batch * case.size**2 * case.spec.vae.channels[0] * 10
    count = {"step": unet, "start": unet, "picture": max(unet, pixels)}.get(case.kind, pixels)
    return 4 * count / 2**30


def memory_gib(case: Case, side: str) -> float:
    """What one side's process is expected to hold."""
    return 0.5 + COPIES[side] * weights_gib(case.model) + activations_gib(case)


def seconds(case: Case, side: str, *, rate: float, rounds: int) -> float:
    """What one side is expected to take for a case, getting ready included.

    Args:
        rate: of the machine's matrix products, FLOP/s.
    """
    ready = 2 + READY[side] * weights_gib(case.model) / 4
    once = 0.02 + flops(case) / (rate * SHARE[side])
    if case.kind == "start":
        return (rounds + 1) * (once + 4 + ready / 3)
    return ready + (rounds + 2) * once
