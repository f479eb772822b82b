"""A safety checker from concepts, with any CLIP that has projections.

A concept's embedding is the mean direction of its sentences or pictures, or is trained: that of a
logistic regression on sorted pictures. Its threshold is chosen from sorted pictures: between the
safe ones and those unsafe ones that lie nearer to it than to any other concept, where the two are
told apart best.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from safelight.checker import Checker
from safelight.errors import InvalidRequest
from safelight.nets.safety_head import SafetyHead
from safelight.safety.clip import Clip
from safelight.safety.concepts import MOST, MOST_SPECIAL, Concept, pictures_in
from safelight.spec import SafetySpec

UNUSED = "(unused)"
"""Name of the slots that fill a checker up to the published number; nothing comes near them."""


def build(
    clip: Clip,
    concepts: Sequence[Concept],
    *,
    safe: Sequence[Path] = (),
    unsafe: Sequence[Path] = (),
    false_positives: float | None = None,
    fit: bool = False,
) -> Checker:
    """Make a checker.

    Args:
        concepts: of :func:`safelight.safety.concepts.read_concepts`.
        safe, unsafe: examples, for the concepts without a threshold.
        false_positives: the largest share of safe examples that each concept may flag.
        fit: train the direction on the examples; for one concept.

    Raises:
        InvalidRequest: a concept has no threshold, and there are no examples to choose one from.
    """
    if fit:
        return _trained(clip, concepts, safe, unsafe, false_positives)
    rows = [_direction(clip, concept) for concept in concepts]
    missing = [c.name for c in concepts if c.threshold is None]
    if missing and not (safe and unsafe):
        raise InvalidRequest(
            "examples",
            f"are needed to choose a threshold for {', '.join(missing)}.",
            "Give a folder with safe/ and unsafe/ in it, or thresholds in the concepts' file.",
        )
    chosen = [c.threshold or 0.0 for c in concepts]
    if missing:
        toward = torch.stack(rows).T
        low, high = ((clip.of_pictures(paths) @ toward).numpy() for paths in (safe, unsafe))
        plain = [k for k, concept in enumerate(concepts) if not concept.special]
        limits = thresholds(low[:, plain], high[:, plain], false_positives)
        found = dict(zip(plain, limits, strict=True))
        for k, concept in enumerate(concepts):
            if concept.special:  # competes with no other
                (found[k],) = thresholds(low[:, [k]], high[:, [k]], false_positives)
            if concept.threshold is None:
                chosen[k] = found[k]
    return _assembled(clip, concepts, rows, chosen)


def _trained(
    clip: Clip,
    concepts: Sequence[Concept],
    safe: Sequence[Path],
    unsafe: Sequence[Path],
    most: float | None,
) -> Checker:
    if len(concepts) != 1 or concepts[0].special:
        raise InvalidRequest(
            "fit", "examples say of one concept only what shows it.", "Build a checker for each."
        )
    if not (safe and unsafe):
        raise InvalidRequest("examples", "are what is fitted to.", "Give safe/ and unsafe/.")
    low, high = clip.of_pictures(safe), clip.of_pictures(unsafe)
    row = fitted(low, high)
    given = concepts[0].threshold
    (limit,) = thresholds((low @ row)[:, None].numpy(), (high @ row)[:, None].numpy(), most)
    return _assembled(clip, concepts, [row], [limit if given is None else given])


def fitted(safe: Tensor, unsafe: Tensor, ridge: float = 1e-4) -> Tensor:
    """The unit direction ``(D,)`` that tells two sets of unit embeddings apart.

    Logistic regression with a ridge penalty, which has one minimum: the same examples give the same
    direction. Both sets weigh the same, whatever their sizes.

    Args:
        safe, unsafe: ``(N, D)``.
    """
    both = torch.cat([unsafe, safe]).double()
    middle, spread = both.mean(0), both.std()
    seen = (both - middle) / spread  # cosines differ by little: well scaled for the solver
    wanted = torch.cat([torch.ones(len(unsafe)), torch.zeros(len(safe))]).double()
    weight = torch.where(wanted > 0, 0.5 / len(unsafe), 0.5 / len(safe))
    direction = torch.zeros(both.shape[1], dtype=torch.float64, requires_grad=True)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([direction, shift], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        said = seen @ direction + shift
        error = F.binary_cross_entropy_with_logits(said, wanted, weight, reduction="sum")
        error = error + ridge * direction.square().sum()
        error.backward()
        return error

    solver.step(loss)  # type: ignore[arg-type]
    return F.normalize(direction.detach(), dim=0).float()


def thresholds(safe: np.ndarray, unsafe: np.ndarray, most: float | None = None) -> list[float]:
    """A threshold for every concept.

    Args:
        safe, unsafe: cosines ``(N, concepts)``.
        most: the largest share of safe pictures that may lie above.
    """
    spread = (unsafe - safe.mean(axis=0)) / (safe.std(axis=0) + 1e-6)
    nearest = spread.argmax(axis=1)
    found = []
    for k in range(safe.shape[1]):
        own = unsafe[nearest == k, k]
        if len(own):
            found.append(_between(safe[:, k], own, most))
        else:  # nothing to tell apart: above everything that is safe
            found.append(float(safe[:, k].max()) + 1e-3)
    return found


def _between(safe: np.ndarray, unsafe: np.ndarray, most: float | None) -> float:
    """The middle of the gap at which (true - false positives) is largest."""
    values = np.unique(np.concatenate([safe, unsafe]))
    cuts = np.concatenate([[values[0] - 1e-3], (values[1:] + values[:-1]) / 2, [values[-1] + 1e-3]])
    true = 1 - np.searchsorted(np.sort(unsafe), cuts, side="right") / len(unsafe)
    false = 1 - np.searchsorted(np.sort(safe), cuts, side="right") / len(safe)
    gain = true - false
    if most is not None:
        gain = np.where(false <= most, gain, -np.inf)
    best = np.flatnonzero(gain == gain.max())
    gaps = np.diff(values, prepend=values[0], append=values[-1])
    return float(cuts[best[gaps[best].argmax()]])


def _direction(clip: Clip, concept: Concept) -> Tensor:
    if concept.pictures is not None:
        each = clip.of_pictures(pictures_in(concept.pictures, "concepts"))
    else:
        each = clip.of_sentences(concept.sentences)
    return F.normalize(each.mean(dim=0), dim=0)


def _assembled(
    clip: Clip, concepts: Sequence[Concept], rows: Sequence[Tensor], chosen: Sequence[float]
) -> Checker:
    """The published shape: slots without a concept hold zeros and a threshold of 1."""
    head = SafetyHead(clip.vision.spec, concepts=MOST, special=MOST_SPECIAL)
    head.vision_model.vision_model.load_state_dict(clip.vision.vision_model.state_dict())
    head.visual_projection.load_state_dict(clip.vision.visual_projection.state_dict())
    names: list[str] = []
    for is_special, embeds, weights in (
        (False, head.concept_embeds, head.concept_embeds_weights),
        (True, head.special_care_embeds, head.special_care_embeds_weights),
    ):
        embeds.data.zero_()
        mine = [k for k, concept in enumerate(concepts) if concept.special == is_special]
        for slot, k in enumerate(mine):
            embeds.data[slot], weights.data[slot] = rows[k], chosen[k]
        names += [concepts[k].name for k in mine] + [UNUSED] * (len(weights) - len(mine))
    spec = SafetySpec(vision=clip.vision.spec, pictures=clip.pictures, names=tuple(names))
    return Checker(spec, head)
