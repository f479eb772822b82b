"""Whether samples copy the pictures that were trained on.

A sample and a training picture are compared in two ways: their pixels at 32x32 (correlation), and
their CLIP embeddings (cosine), with the training picture's mirror image too. How near is too near
hangs on the pictures: five views of one toy on one table are alike before anything is trained. So
the scale is the pictures' own. Let ``d`` be the smallest distance (one minus similarity) between
any two of them: a sample that is nearer than ``d / 2`` to one of them is nearer than two
*different* pictures of the subject ever are. A distance over 0.1 is never near. Pictures that are
copies of each other (distance under 0.001) count as one; of a single picture nothing can be
learned, and the limit is 0.1.

A sample is called a copy where *both* measures say so of one and the same picture. Either alone
errs: a CLIP gives two pictures of the same things in the same places almost one embedding, and at
32x32 two pale backgrounds correlate. Copies that are shifted or cut so far that their pixels no
longer correlate are missed; ``nearest_embedding`` shows them.

The idea of measuring a sample's nearest neighbour against its neighbours' own distances is that of
Carlini et al. 2023, "Extracting Training Data from Diffusion Models" (2301.13188), section 4.2.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from safelight.checker import Checker, clip_pixels
from safelight.data.clip import CLIP, load_clip
from safelight.model import Model
from safelight.train.personal_recipe import PersonalRecipe

log = logging.getLogger(__name__)

Embed = Callable[[list[Image.Image]], np.ndarray]
"""Pictures to embeddings of unit length ``(N, D)``."""

SIDE = 32
NEARER, FARTHEST, SAME = 0.5, 0.1, 0.001
"""Share of the smallest distance; largest limit; distance under which two pictures are one."""


def limit(apart: np.ndarray) -> float:
    """The distance under which a sample is a copy; see the file's head.

    Args:
        apart: distances of the pictures to each other ``(N, N)``.
    """
    pairs = apart[np.triu_indices(len(apart), 1)]
    pairs = pairs[pairs >= SAME]
    return min(NEARER * float(pairs.min()), FARTHEST) if len(pairs) else FARTHEST


@dataclass(frozen=True)
class Look:
    """What one sample is near to."""

    nearest: dict[str, tuple[int, float]]
    """By measure: the nearest training picture, and its distance."""
    copied: int | None
    """The training picture that the sample copies."""


class Alarm:
    """Compares samples with the pictures that were trained on.

    Args:
        pictures: uint8 ``(N, H, W, 3)``.
        embed: of CLIP; None compares pixels only.
    """

    def __init__(self, pictures: np.ndarray, embed: Embed | None = None) -> None:
        self._views: dict[str, Callable[[np.ndarray], np.ndarray]] = {"pixels": _views}
        if embed is not None:
            self._views["embedding"] = lambda rows: embed([Image.fromarray(p) for p in rows])
        self._known, self.limits = dict[str, np.ndarray](), dict[str, float]()
        for measure, view in self._views.items():
            known = np.stack([view(pictures), view(np.ascontiguousarray(pictures[:, :, ::-1]))])
            self._known[measure] = known
            apart = _apart(known, known[0])
            self.limits[measure] = limit((apart + apart.T) / 2)
        log.info("samples count as copies under the distances %s", self.limits)

    def look(self, samples: np.ndarray) -> list[Look]:
        """What each sample of ``(M, H, W, 3)`` is near to."""
        apart = {m: _apart(self._known[m], view(samples)) for m, view in self._views.items()}
        # How far inside all limits: below 1 by every measure.
        worst = np.max([apart[m] / self.limits[m] for m in apart], axis=0)
        return [
            Look(
                {m: (int(a[:, i].argmin()), float(a[:, i].min())) for m, a in apart.items()},
                int(worst[:, i].argmin()) if worst[:, i].min() < 1 else None,
            )
            for i in range(len(samples))
        ]

    def likeness(self, samples: np.ndarray) -> float | None:
        """The mean cosine of samples' embeddings with the pictures': how well the subject is hit
        (CLIP-I of Ruiz et al. 2023, section 4.1). None without a CLIP."""
        if "embedding" not in self._known:
            return None
        return float((self._views["embedding"](samples) @ self._known["embedding"][0].T).mean())


def embedder(settings: PersonalRecipe, model: Model) -> Embed | None:
    """The CLIP to compare with: the recipe's, the model's, or its safety checker's; or none."""
    if settings.clip is not None:
        return load_clip(settings.clip).pictures
    if model.vision is not None:
        return CLIP(model.vision, None, None, model.spec.name).pictures
    if model.checker is not None:
        return _of_checker(model.checker)
    log.warning(
        "%s has no vision tower: the copying alarm compares pixels only (clip names a CLIP)",
        model.spec.name,
    )
    return None


def _of_checker(checker: Checker) -> Embed:
    weight = checker.head.visual_projection.weight

    @torch.inference_mode()
    def embed(pictures: Sequence[Image.Image]) -> np.ndarray:
        pixels = torch.stack([clip_pixels(p, checker.spec.pictures) for p in pictures])
        states = checker.head.vision_model(pixels.to(weight.device, weight.dtype))
        rows = checker.head.visual_projection(states)
        return torch.nn.functional.normalize(rows.float(), dim=-1).cpu().numpy()

    return embed


def _apart(known: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Distances ``(N, M)`` of unit vectors ``(M, D)`` to the nearer view of each, ``(2, N, D)``."""
    return 1.0 - (known @ rows.T).max(axis=0)


def _views(pictures: np.ndarray) -> np.ndarray:
    """What of pictures ``(N, H, W, 3)`` is compared: unit vectors ``(N, 3072)`` without the mean,
    so that a product is a correlation."""
    small = [
        np.asarray(Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
        for p in pictures
    ]
    rows = np.stack(small).reshape(len(small), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
