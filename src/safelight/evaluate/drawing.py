"""Pictures for measuring, from a generator: all of them, or an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from safelight.errors import SafelightError
from safelight.evaluate.score import Generate
from safelight.generate import Generator
from safelight.request import ImageResult
from safelight.spec import ModelSpec


def drawn(generator: Generator, **wishes: Any) -> Generate:
    """The generator's ``generate`` as a function of prompts and seeds.

    Args:
        wishes: fields of a request, for every picture; None leaves the card's.

    Raises (the function):
        SafelightError: a picture is missing: a score over the others would lie.
    """
    wishes = {name: value for name, value in wishes.items() if value is not None}

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        results = generator.generate(list(prompts), seed=list(seeds), count=1, **wishes)
        return np.stack([pixels(r, f"of {p!r}") for p, r in zip(prompts, results, strict=True)])

    return generate


def pixels(result: ImageResult, what: str) -> np.ndarray:
    """A result's picture, uint8 ``(H, W, 3)``.

    Raises:
        SafelightError: there is none.
    """
    if result.image is None:
        raise SafelightError(f"no picture {what}, seed {result.seed}: {result.message}")
    return np.asarray(result.image.convert("RGB"))


def unguarded(generator: Generator) -> dict[str, Any]:
    """The wish that switches a safety checker off, where there is one.

    For numbers alone: a black picture in the place of a flagged one would be measured as if the
    model had made it. Pictures that people will look at keep the checker.
    """
    return {} if generator.model.checker is None else {"safety": "off"}


def card_sampler(spec: ModelSpec) -> str:
    """The sampler of the cards' figure: PLMS for models like v1, DDIM for those like v2."""
    like_v1 = spec.family == "sd-v1" and spec.schedule.prediction_type == "epsilon"
    return "pndm" if like_v1 else "ddim"
