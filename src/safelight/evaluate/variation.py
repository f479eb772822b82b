"""What variations keep of the pictures that they were made from.

Two answers: the cosine of CLIP embeddings of input and output (fidelity), for any pictures; and,
where the inputs are renders of still life, the share of outputs in which the judge finds what the
input shows. A model of this kind is conditioned on a CLIP embedding, so fidelity in that CLIP's own
space is the kindest measure there is: the features' name says whose it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from safelight.data.clip import CLIP
from safelight.errors import InvalidRequest
from safelight.evaluate import metrics
from safelight.evaluate.drawing import pixels, unguarded
from safelight.evaluate.features import Extractor, Pictures, batches, clip_extractor
from safelight.evaluate.judge import Judge
from safelight.evaluate.metrics import Measured
from safelight.evaluate.prompts import Prompt
from safelight.evaluate.score import Reading, read, renders, wanted_of
from safelight.generate import Generator
from safelight.generate.able import LOOKS
from safelight.request import GenerateRequest

Vary = Callable[[Sequence[Image.Image], Sequence[int]], np.ndarray]
"""Pictures and seeds to uint8 ``(N, H, W, 3)``."""
SHOWN = 16


@dataclass
class Kept:
    """What was kept of one set of inputs."""

    name: str
    fidelity: Measured
    outputs: Reading | None = None
    """What the judge finds, where the inputs are still life."""
    inputs: Reading | None = None
    """The judge's ceiling: what it finds in the inputs themselves."""
    noise_level: int | None = None
    shown: list[tuple[Image.Image, Image.Image]] = field(default_factory=list)
    """The first inputs with their outputs."""


def must_vary(generator: Generator) -> bool:
    """Whether a model makes pictures from pictures only.

    An unCLIP model with a prior in front can be asked with words, and is measured as any other.
    """
    return generator.model.spec.family in LOOKS and generator.model.prior is None


def check(generator: Generator, noise_levels: Sequence[int | None] = (None,)) -> None:
    """Raises InvalidRequest: the model cannot do this."""
    spec = generator.model.spec
    if spec.family not in LOOKS:
        raise InvalidRequest(
            "model", f"{spec.name} ({spec.family}) makes no variations.", f"One of {LOOKS} does."
        )
    if spec.family != "unclip" and any(level is not None for level in noise_levels):
        raise InvalidRequest("noise_levels", f"{spec.name} has none.", "unclip models have.")


def varied(generator: Generator, **wishes: Any) -> Vary:
    """The generator as a function of pictures and seeds.

    Args:
        wishes: fields of a request, for every picture; None leaves the card's.
    """
    wishes = {name: value for name, value in wishes.items() if value is not None}
    wishes |= unguarded(generator)

    def vary(pictures: Sequence[Image.Image], seeds: Sequence[int]) -> np.ndarray:
        requests = [
            GenerateRequest.from_kwargs(image=picture, seed=seed, count=1, **wishes)
            for picture, seed in zip(pictures, seeds, strict=True)
        ]
        made = generator.generate(request=requests)
        return np.stack([pixels(result, "like an input") for result in made])

    return vary


def own_clip(generator: Generator, name: str) -> CLIP | None:
    """The model's own vision tower, where it has one."""
    vision = generator.model.vision
    return None if vision is None else CLIP(vision, None, None, name)


def kept(
    name: str,
    inputs: Pictures,
    vary: Vary,
    extractor: Extractor,
    *,
    seeds: Iterable[int],
    batch: int = 50,
    progress: Callable[[int], None] | None = None,
) -> tuple[Kept, np.ndarray, np.ndarray | None]:
    """Vary a stream of pictures, and measure their fidelity.

    Args:
        seeds: one a picture.
        progress: called with the number of pictures done so far.

    Returns:
        the measurement, the outputs, and the inputs as an array where all are of one size.
    """
    stream, before, after = iter(seeds), [], []
    shown: list[tuple[Image.Image, Image.Image]] = []
    given: list[np.ndarray] = []
    outputs: list[np.ndarray] = []
    for part in batches(inputs, batch):
        made = vary(part, [next(stream) for _ in part])
        before.append(extractor(part))
        after.append(extractor(made))
        outputs.extend(made)
        given.extend(np.asarray(p) for p in part)
        if len(shown) < SHOWN:
            shown += list(zip(part, map(Image.fromarray, made), strict=True))
        if progress is not None:
            progress(len(outputs))
    if not outputs:
        raise InvalidRequest("images", f"{name} holds no pictures.")
    found = metrics.fidelity(np.concatenate(before), np.concatenate(after), extractor.name)
    same = len({p.shape for p in given}) == 1
    result = Kept(name, found, shown=shown[:SHOWN])
    return result, np.stack(outputs), np.stack(given) if same else None


def kept_of_list(
    name: str,
    prompts: Sequence[Prompt],
    vary: Vary,
    extractor: Extractor,
    judge: Judge,
    *,
    size: int,
    batch: int = 50,
    progress: Callable[[int], None] | None = None,
) -> Kept:
    """Renders of a list's scenes, varied with the list's seeds, and read by the judge."""
    scenes = [p.scene() for p in prompts]
    inputs = (picture for part in renders(scenes, size) for picture in part)
    result, made, given = kept(
        name, inputs, vary, extractor,
        seeds=[p.seed for p in prompts], batch=batch, progress=progress,
    )  # fmt: skip
    assert given is not None
    wanted = wanted_of(prompts)
    result.outputs, result.inputs = read(made, wanted, judge), read(given, wanted, judge)
    return result


def model_extractor(generator: Generator, name: str, clip: CLIP | None) -> Extractor:
    """The CLIP that was given, or else the model's own.

    Raises:
        InvalidRequest: there is neither.
    """
    chosen = clip or own_clip(generator, name)
    if chosen is None:
        raise InvalidRequest("clip", f"{name} has no vision tower of its own.", "Give --clip.")
    return clip_extractor(chosen)
