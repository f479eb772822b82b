"""stable-diffusion.cpp through its Python build (``stable-diffusion-cpp-python``).

Its interface makes whole pictures only. A step is timed inside one: the callback between two
steps waits until it is this side's turn again. It reads words with a vocabulary of its own and
draws noise of its own, so that nothing can be compared with the others' results, only its time
and memory.
"""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.compare import inputs, weights
from benchmarks.compare.cases import GUIDANCE, Case
from benchmarks.compare.weights import PROMPT

MANY = 1000
"""Steps of the picture whose steps are timed; the process ends before it is finished."""


class Plain:
    """Its weights in float32, as the file has them."""

    numbers = "f32"

    def __init__(self, model: str, cache: Path, threads: int) -> None:
        self.name, self.cache, self.threads = model, cache, threads
        self._go: queue.Queue[None] = queue.Queue()
        self._said: queue.Queue[float | BaseException] = queue.Queue()
        self._sd: Any = None

    def export(self, case: Case) -> None:
        if self.name in ("tiny", "micro"):
            raise ValueError("its networks have the published widths only")
        if case.kind == "encode":
            raise ValueError("its Python interface gives no encoding alone")
        if case.batch > 1 and case.kind != "picture":
            raise ValueError("it makes the pictures of a batch one after the other")
        weights.single_file(self.name, self.cache)

    def load(self, case: Case) -> None:
        from stable_diffusion_cpp import StableDiffusion  # pyright: ignore[reportMissingImports]

        self._sd = StableDiffusion(
            model_path=str(weights.single_file(self.name, self.cache)),
            n_threads=self.threads,
            wtype=self.numbers,
            prediction="v" if case.spec.schedule.prediction_type == "v" else "eps",
            vae_decode_only=True,
            verbose=False,
        )

    def prepare(self, case: Case) -> None:
        self._case = case
        if case.kind in ("step", "start"):
            threading.Thread(target=self._steps, daemon=True).start()

    def run(self, first: bool) -> float:
        case = self._case
        if case.kind in ("step", "start"):
            began = time.perf_counter()
            self._go.put(None)
            said = self._said.get()
            if isinstance(said, BaseException):
                raise said
            return said - began
        return self._decode() if case.kind == "decode" else self._picture()

    def _steps(self) -> None:
        def between(step: int, steps: int, _seconds: float) -> None:
            if steps == MANY and step >= 1:
                self._said.put(time.perf_counter())
                self._go.get()

        self._go.get()
        try:
            self._generate(MANY, GUIDANCE, between)
            raise RuntimeError("it told of no steps")
        except BaseException as error:
            self._said.put(error)

    def _decode(self) -> float:
        """From the end of the only step to the picture."""
        ended: list[float] = []
        self._generate(1, 1.0, lambda *_: ended.append(time.perf_counter()))
        if not ended:
            raise RuntimeError("it told of no steps")
        return time.perf_counter() - ended[-1]

    def _picture(self) -> float:
        began = time.perf_counter()
        self._generate(self._case.steps, GUIDANCE, None, self._case.batch)
        return time.perf_counter() - began

    def _generate(self, steps: int, scale: float, told: Any, count: int = 1) -> None:
        self._sd.generate_image(
            prompt=PROMPT,
            width=self._case.size,
            height=self._case.size,
            cfg_scale=scale,
            sample_method="dpm++2m",
            sample_steps=steps,
            seed=inputs.SEED,
            batch_count=count,
            progress_callback=told,
        )


class Quantised(Plain):
    """Its weights in eight bits, as it is mostly used."""

    numbers = "q8_0"
