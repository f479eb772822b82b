"""The sides that run in torch: ours, diffusers as it comes, diffusers compiled; and the machine's
own rate of matrix products."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.compare import inputs, weights
from benchmarks.compare.cases import GUIDANCE, Case
from benchmarks.compare.weights import PROMPT


class TorchSide:
    """What those have in common: a case becomes a function of the timestep."""

    def __init__(self, model: str, cache: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self.name, self.cache = model, cache
        self._times = itertools.cycle(inputs.LATER)
        self._call: Callable[[float], Any] | None = None

    def export(self, case: Case) -> None:
        weights.folder(self.name, self.cache)

    def load(self, case: Case) -> None:
        raise NotImplementedError

    def prepare(self, case: Case) -> None:
        self._call = None  # lets go of the last case first
        self._call = getattr(self, "step" if case.kind == "start" else case.kind)(case)

    def run(self, first: bool) -> np.ndarray | None:
        assert self._call is not None
        with torch.inference_mode():
            answer = self._call(inputs.FIRST if first else next(self._times))
        if not first:
            return None
        return answer.numpy() if isinstance(answer, Tensor) else answer


class Ours(TorchSide):
    """Safelight as it comes: its own plan for this machine."""

    def load(self, case: Case) -> None:
        from safelight.generate import Generator
        from safelight.model import Model

        self.model = Model.load(weights.folder(self.name, self.cache), device="cpu")
        self.generator = Generator(self.model)

    def step(self, case: Case) -> Callable[[float], Tensor]:
        """The prompts' keys and values are known from the first step on, as in a run."""
        from safelight.conditioning import Conditioning
        from safelight.runtime import Row

        given = inputs.of(case)
        latents = torch.from_numpy(given.latents).split(1)
        empty = Conditioning(torch.from_numpy(given.empty[0]))
        prompts = [Conditioning(torch.from_numpy(prompt)) for prompt in given.prompts]

        def step(timestep: float) -> Tensor:
            rows = [Row(x, timestep, empty) for x in latents]
            rows += [Row(x, timestep, told) for x, told in zip(latents, prompts, strict=True)]
            return self.model.runtime.predict(rows)

        return step

    def decode(self, case: Case) -> Callable[[float], Tensor]:
        """One after the other, as pictures are."""
        latents = torch.from_numpy(inputs.of(case).latents).split(1)
        return lambda _: torch.cat([self.model.runtime.decode(z) for z in latents])

    def encode(self, case: Case) -> Callable[[float], Tensor]:
        pixels = torch.from_numpy(inputs.of(case).pixels)
        return lambda _: self.model.runtime.encode(pixels).mean

    def picture(self, case: Case) -> Callable[[float], np.ndarray]:
        def picture(_: float) -> np.ndarray:
            results = self.generator.generate(
                PROMPT,
                seed=inputs.SEED,
                count=case.batch,
                steps=case.steps,
                guidance_scale=GUIDANCE,
                sampler="dpm++2m",
                width=case.size,
                height=case.size,
            )
            return np.stack([np.asarray(result.image) for result in results])

        return picture


class Diffusers(TorchSide):
    """diffusers as it comes: its own pipeline, eager, float32."""

    def load(self, case: Case) -> None:
        from benchmarks import tiny_model

        self.pipe = tiny_model.peer(weights.folder(self.name, self.cache))

    def step(self, case: Case) -> Callable[[float], Tensor]:
        x, contexts = map(torch.from_numpy, inputs.guided(inputs.of(case)))
        net = self.pipe.unet
        return lambda t: net(x, torch.tensor(t), encoder_hidden_states=contexts, return_dict=False)[
            0
        ]

    def decode(self, case: Case) -> Callable[[float], Tensor]:
        latents = torch.from_numpy(inputs.of(case).latents) / self.pipe.vae.config.scaling_factor
        return lambda _: self.pipe.vae.decode(latents, return_dict=False)[0]

    def encode(self, case: Case) -> Callable[[float], Tensor]:
        pixels = torch.from_numpy(inputs.of(case).pixels)
        return lambda _: self.pipe.vae.encode(pixels, return_dict=False)[0].mean

    def picture(self, case: Case) -> Callable[[float], np.ndarray]:
        from safelight.diffusion.noise import initial_noise

        cells = case.size // case.spec.vae.factor
        shape = (1, case.spec.vae.latent_channels, cells, cells)
        noise = torch.cat([initial_noise(inputs.SEED + k, shape) for k in range(case.batch)])

        def picture(_: float) -> np.ndarray:
            images = self.pipe(
                [PROMPT] * case.batch,
                latents=noise,
                num_inference_steps=case.steps,
                guidance_scale=GUIDANCE,
                width=case.size,
                height=case.size,
            ).images
            return np.stack([np.asarray(image) for image in images])

        return picture


class Compiled(Diffusers):
    """diffusers with what its speed guide names for a CPU: channels-last, compiled, frozen."""

    def load(self, case: Case) -> None:
        from torch._inductor import config

        config.freezing = True  # its weights become constants, laid out by the compiler
        super().load(case)
        for net in (self.pipe.unet, self.pipe.vae):
            net.to(memory_format=torch.channels_last)
        self._plain = self.pipe.unet, self.pipe.vae.decode, self.pipe.vae.encode

    def prepare(self, case: Case) -> None:
        torch._dynamo.reset()
        unet, decode, encode = self._plain
        self.pipe.unet = torch.compile(unet, dynamic=False)
        self.pipe.vae.decode = torch.compile(decode, dynamic=False)
        self.pipe.vae.encode = torch.compile(encode, dynamic=False)
        super().prepare(case)

    def run(self, first: bool) -> np.ndarray | None:
        assert self._call is not None
        with torch.no_grad():  # freezing and inference tensors do not go together
            answer = self._call(inputs.FIRST if first else next(self._times))
        if not first:
            return None
        return answer.numpy() if isinstance(answer, Tensor) else answer


class Sgemm(TorchSide):
    """The machine's own matrix product, which everything is a share of."""

    def export(self, case: Case) -> None:
        return

    def load(self, case: Case) -> None:
        side = sgemm_side(case)
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (torch.randn(side, side, generator=generator) for _ in range(2))
        self.out = torch.empty(side, side)

    def prepare(self, case: Case) -> None:
        self._call = lambda _: torch.mm(self.a, self.b, out=self.out)

    def run(self, first: bool) -> None:
        super().run(False)


def sgemm_side(case: Case) -> int:
    """4096, as the accounting has it; less in a rehearsal."""
    return 256 if case.model == "micro" else 4096
