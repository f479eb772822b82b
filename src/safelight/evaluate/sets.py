"""All metrics of one set of pictures against another, from sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from safelight.data.clip import CLIP
from safelight.data.sources import BadSample, Source
from safelight.data.tables import Bad
from safelight.errors import InvalidRequest
from safelight.evaluate import metrics
from safelight.evaluate.features import Extractor, clip_extractor
from safelight.evaluate.metrics import Measured

NAMES = (*metrics.METRICS, "clip-score")


@dataclass
class Read:
    """What was read of a source: features, and captions where every picture has one."""

    features: np.ndarray
    captions: list[str]
    bad: Bad


def read(
    source: Source,
    extractor: Extractor,
    *,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Read:
    """Features of a source's pictures; those that cannot be read are listed, and left out.

    Args:
        source: of :func:`~safelight.data.sources.open_source`.
        extractor: what features.
        limit: only the first pictures.
        progress: called with the number of pictures since the last call.
    """
    captions: list[str] = []
    bad = Bad()

    def kept() -> Iterator[Image.Image]:
        for picture, words in readable_samples(source, limit, bad, progress):
            captions.extend(words[:1])
            yield picture

    try:
        features = extractor(kept())
    except ValueError as error:
        raise InvalidRequest("pictures", f"{source.name}: {error}.") from error
    return Read(features, captions if len(captions) == len(features) else [], bad)


def readable_samples(
    source: Source,
    limit: int | None,
    bad: Bad,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[Image.Image, tuple[str, ...]]]:
    """Pictures with their captions; those that cannot be read go to ``bad``."""
    for place in range(min(len(source), limit or len(source))):
        if progress is not None:
            progress(1)
        try:
            found = source.picture(place), source.captions(place)
        except BadSample as error:
            bad.add(source.key(place), error)
        else:
            yield found


def readable(source: Source, limit: int | None = None) -> Iterator[Image.Image]:
    """The pictures of a source, without those that cannot be read."""
    return (picture for picture, _ in readable_samples(source, limit, Bad()))


def compare(
    pictures: Source,
    reference: Source,
    clip: CLIP,
    *,
    names: Sequence[str] | None = None,
    inception: Extractor | None = None,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Measured], list[Bad]]:
    """Measure pictures against a reference.

    Args:
        pictures: those to measure, with captions where the CLIP score is wanted.
        reference: those to compare them with.
        clip: of CMMD and the CLIP score, and of the others where ``inception`` is not given.
        names: of :data:`NAMES`. None: all that can be measured.
        inception: features of the Fréchet distance, KID, precision and recall.
        limit: only the first pictures of each.
        progress: called with the number of pictures since the last call.

    Raises:
        InvalidRequest: an unknown metric, or one that these pictures do not allow.
    """
    wanted = check(names)
    embed = clip_extractor(clip)
    seen = [read(s, embed, limit=limit, progress=progress) for s in (pictures, reference)]
    bad = [r.bad for r in seen]
    sides = {embed.name: [r.features for r in seen]}
    main = embed
    if inception is not None and set(wanted) & {"frechet", "kid", "precision-recall"}:
        main = inception
        sides[main.name] = [
            read(s, main, limit=limit, progress=progress).features for s in (pictures, reference)
        ]
    results: list[Measured] = []
    for name in wanted:
        if name == "clip-score":
            if _can_score(seen[0], clip, asked=names is not None):
                words = clip.words(seen[0].captions)
                results.append(metrics.clip_score(seen[0].features, words, embed.name))
            continue
        by = embed if name == "cmmd" else main
        if names is None and name == "precision-recall" and min(map(len, sides[by.name])) <= 3:
            continue  # too few for three neighbours
        try:
            found = metrics.METRICS[name](*sides[by.name], by.name)
        except ValueError as error:
            raise InvalidRequest("pictures", f"{error}.") from error
        results += [found] if isinstance(found, Measured) else found
    return results, bad


def check(names: Sequence[str] | None) -> list[str]:
    """The metrics asked for, all of them by default.

    Raises:
        InvalidRequest: unknown.
    """
    wanted = list(NAMES if names is None else dict.fromkeys(names))
    if wrong := [name for name in wanted if name not in NAMES]:
        raise InvalidRequest("metric", f"no metric {wrong[0]!r}.", f"One of {', '.join(NAMES)}.")
    return wanted


def _can_score(seen: Read, clip: CLIP, *, asked: bool) -> bool:
    able = clip.text is not None and clip.text.text_projection is not None
    if asked and not able:
        raise InvalidRequest("clip", f"{clip.name} has no text tower.", "Give one with both.")
    if asked and not seen.captions:
        raise InvalidRequest("metric", "clip-score needs a caption for every picture.")
    return able and bool(seen.captions)
