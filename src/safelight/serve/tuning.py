"""How large a network call should be on this machine: measured once, not guessed.

A few calls of the denoising network of each size at the model's native picture size; the smallest
size that gives nearly the most rows a second is taken, and remembered in the user's cache folder
under everything that it hangs on. No picture hangs on it: sizes of calls move rounding at most, and
``deterministic`` requests have a call each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from safelight.conditioning import Conditioning
from safelight.generate import Generator
from safelight.model import Model
from safelight.runtime import Row
from safelight.serve import logs
from safelight.store.pictures import write

log = logging.getLogger(__name__)

SIZES = (2, 4, 8, 16, 32)
"""Rows of a call: two branches a picture."""
ENOUGH = 0.97
"""Share of the best throughput that a smaller call must reach to be preferred."""
_SECONDS = 20.0  # no larger size is tried after that


def tune(generator: Generator, name: str, folder: Path | None = None) -> int:
    """Choose the size of a model's network calls, and warm it up.

    Args:
        name: of the model, for the log.
        folder: of the cache; None for the user's.

    Returns:
        rows of a call.
    """
    model, key = generator.model, _key(generator.model)
    file = (folder or cache_folder()) / "tuning.json"
    rows = int(_remembered(file).get(key, 0))
    if rows not in SIZES:
        times = measure(lambda count: _call(model, count))
        rows = best(times)
        _remember(file, key, rows)
        told = {str(count): round(seconds, 4) for count, seconds in times.items()}
        logs.event(log, "measured", model=name, rows=rows, seconds=told)
    cells = _side(model) ** 2
    generator.engine.max_cells = rows * cells
    generator.batch_cells = max(1, rows // 2) * cells
    _warm(model, rows)
    return rows


def measure(
    call: Callable[[int], object],
    *,
    sizes: tuple[int, ...] = SIZES,
    rounds: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Seconds of one call by its rows: the fastest of ``rounds``, after one that does not count.
    It stops where memory runs out, or time, or where larger calls have been slower twice."""
    began, times = clock(), {}
    worse = 0
    for rows in sizes:
        try:
            call(rows)
            spent = []
            for _ in range(rounds):
                start = clock()
                call(rows)
                spent.append(clock() - start)
        except (MemoryError, RuntimeError):
            break
        top = max((n / s for n, s in times.items()), default=0.0)
        times[rows] = max(min(spent), 1e-9)
        worse = worse + 1 if rows / times[rows] < top else 0
        if worse == 2 or clock() - began > _SECONDS:
            break
    return times


def best(times: Mapping[int, float]) -> int:
    """The smallest size that reaches nearly the best rows a second; the least of all where nothing
    could be measured."""
    rates = {rows: rows / seconds for rows, seconds in times.items()}
    top = max(rates.values(), default=0.0)
    return min((rows for rows, rate in rates.items() if rate >= ENOUGH * top), default=SIZES[0])


def cache_folder() -> Path:
    """The user's, as the system has it."""
    given = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return (Path(given) if given else home) / "safelight"


# -- the network ----------------------------------------------------------------------------------


def _side(model: Model) -> int:
    return model.spec.native_size // model.spec.vae.factor


def _call(model: Model, rows: int) -> None:
    model.runtime.predict([row for k in range(max(1, rows // 2)) for row in _branches(model, k)])
    _wait(model)


def _branches(model: Model, seed: int) -> list[Row]:
    """A picture's two rows: noise, and conditioning of the right shapes."""
    spec, unet = model.spec, model.spec.unet
    random = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(model.device, model.dtype)

    side, latent = _side(model), spec.vae.latent_channels
    x = noise(1, latent, side, side)
    vector = planes = guidance = None
    if unet.class_embedding == "table":
        vector = torch.tensor(0, device=model.device)
    elif unet.class_embedding == "projection":
        vector = noise(unet.class_embedding_size)
    if unet.in_channels > latent:
        planes = noise(unet.in_channels - latent, side, side)
    if unet.guidance_embedding_size:
        guidance = noise(unet.guidance_embedding_size)
    tokens = 1 if spec.text is None else spec.text.context_length
    return [
        Row(x, 500.0, Conditioning(noise(tokens, unet.context_width), vector, planes, guidance))
        for _ in range(2)
    ]


def _warm(model: Model, rows: int) -> None:
    """A call and a decoding, so that the first picture finds memory and kernels ready."""
    side = _side(model)
    try:
        _call(model, rows)
        latents = torch.zeros(1, model.spec.vae.latent_channels, side, side, device=model.device)
        model.runtime.decode(latents.to(next(model.vae.parameters()).dtype))
        _wait(model)
    except (MemoryError, RuntimeError):
        log.warning("the model could not be warmed up", exc_info=True)


def _wait(model: Model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


# -- remembered -----------------------------------------------------------------------------------


def _key(model: Model) -> str:
    """Everything that the answer hangs on."""
    device = model.device
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    parts = [
        *(chip, os.cpu_count(), torch.get_num_threads(), torch.__version__),
        *(str(device), str(model.dtype), repr(model.runtime.plan)),
        *(model.spec.native_size, model.spec.unet.model_dump_json()),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _remembered(file: Path) -> dict[str, int]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and all(map(_whole, found.values())) else {}


def _whole(value: object) -> bool:
    return isinstance(value, int)


def _remember(file: Path, key: str, rows: int) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, json.dumps({**_remembered(file), key: rows}, indent=1).encode())
    except OSError as error:
        log.warning("what was measured cannot be kept in %s: %s", file, error)
