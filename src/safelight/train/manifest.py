"""What a run was: written beside its weights, read by the card."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from safelight import __version__
from safelight.train import emissions
from safelight.train.recipe import Recipe


@cache
def code_digest() -> str:
    """BLAKE2 of the package's Python files: the code, whatever its version is called."""
    root = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def manifest(
    recipe: Recipe, *, seen: int, seconds: float, processes: int, data_digest: str
) -> dict[str, Any]:
    """Everything a card needs to say how weights were made.

    Args:
        seconds: by the clock; hours of hardware are that times ``processes`` accelerators, or
            times one for a machine without any.
        data_digest: what :func:`Objective.data_digest` says of the pictures.
    """
    accelerator = torch.cuda.is_available()
    hardware = recipe.site.hardware or (torch.cuda.get_device_name() if accelerator else "")
    cores, gib = os.cpu_count() or 1, _memory()
    watts = emissions.WATTS.get(hardware)
    if watts is None and not hardware:
        watts = emissions.processor_watts(cores, gib)
    hours = seconds / 3600 * (processes if accelerator else 1)
    intensity = emissions.carbon(recipe.site.provider, recipe.site.region)
    kwh, kg = (None, None) if watts is None else emissions.estimate(hours, watts, intensity)
    return {
        "schema": 1,
        "name": recipe.name,
        "recipe": recipe.model_dump(mode="json"),
        "data_digest": data_digest,
        "code": {"version": __version__, "digest": code_digest(), "torch": torch.__version__},
        "images": seen,
        "steps": seen // recipe.optim.step,
        "seconds": round(seconds, 1),
        "hardware": {
            "name": hardware or f"{cores} cores, {platform.machine()}",
            "processes": processes,
            "cores": cores,
            "memory_gib": round(gib, 1),
            "hours": round(hours, 4),
            "watts": watts,
            "provider": recipe.site.provider,
            "region": recipe.site.region,
        },
        "energy_kwh": kwh,
        "co2_kg": kg,
        "formula": "hours x watts / 1000 = kWh; kWh x kg a kWh of the place = kg of CO2 "
        "(Lacoste et al. 2019): an estimate, not a measurement",
    }


def write(folder: Path, record: dict[str, Any], name: str = "manifest.json") -> None:
    """A record in a run's folder, whole or not at all."""
    part = folder / f"{name}.part"
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(folder / name)


def _memory() -> float:
    """The machine's memory in GiB; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return 0.0
