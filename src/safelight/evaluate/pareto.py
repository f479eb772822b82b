"""The cards' figure: distance against CLIP score over guidance scales, many models in one plot.

"Evaluations with different classifier-free guidance scales (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
and 50 sampling steps" (PLMS for v1, DDIM for v2), on 10,000 random COCO captions at 512x512. One
model at one scale is a point. Points are kept in a file, a line each, and named by everything that
they hang on, so that a sweep that is cut off goes on where it was, in the middle of a point too,
and one that is extended measures only what is new.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from safelight.data.clip import CLIP
from safelight.errors import InvalidRequest, MissingExtra
from safelight.evaluate import metrics
from safelight.evaluate.briefs import Brief
from safelight.evaluate.drawing import card_sampler, drawn, unguarded
from safelight.evaluate.features import Extractor, clip_extractor
from safelight.evaluate.metrics import Measured
from safelight.evaluate.rows import RowFile
from safelight.generate import Generator
from safelight.spec import Record

log = logging.getLogger(__name__)

SCHEMA = 1
SCALES = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
STEPS = 50
DISTANCES = ("frechet", "kid", "cmmd")
POINTS = "points.jsonl"
Progress = Callable[[str, int, int], None]
"""Called with a stage's name, pictures done, pictures in all."""


class Settings(Record):
    """Everything that a point hangs on."""

    schema_: int = SCHEMA
    model: str
    weights: str
    """The model's digest."""
    guidance_scale: float
    steps: int
    sampler: str
    size: int
    prompts: str
    prompts_digest: str
    features: tuple[str, ...]

    @property
    def key(self) -> str:
        """Of equal settings; the model's name does not count where its weights are known."""
        same = self.model_dump(exclude={"model", "prompts"} if self.weights else {"prompts"})
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]


class Point(Record):
    """One model at one guidance scale."""

    settings: Settings
    distances: tuple[Measured, ...]
    clip_score: Measured

    def distance(self, metric: str, features: str) -> Measured:
        """One of the distances; CMMD is in CLIP's features always."""
        for found in self.distances:
            if found.metric == metric and (found.features == features or metric == "cmmd"):
                return found
        raise KeyError(metric)


class Notebook:
    """Points in a file, a line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.points: dict[str, Point] = {}
        self._cut = False
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self._cut = bool(text) and not text.endswith("\n")
        for number, line in enumerate(text.splitlines(), 1):
            try:
                point = Point.model_validate_json(line)
            except ValidationError:
                log.warning("%s:%d is no point of this version and is measured again", path, number)
                continue
            self.points[point.settings.key] = point

    def add(self, point: Point) -> None:
        """Write a point at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            # A line that was cut off by a kill stays, alone.
            file.write(("\n" if self._cut else "") + point.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._cut = False
        self.points[point.settings.key] = point


class Sweep:
    """Measures models on one brief, in one set of features.

    Args:
        brief: prompts and reference.
        clip: for the CLIP score and distances; with a text tower.
        inception: further features for the distances.
        folder: where points and features of the reference are kept.
        batch: pictures a call.
    """

    def __init__(
        self,
        brief: Brief,
        clip: CLIP,
        *,
        inception: Extractor | None = None,
        folder: Path,
        batch: int = 50,
        progress: Progress | None = None,
    ) -> None:
        self.brief, self.folder, self.batch = brief, folder, batch
        self.extractors = [clip_extractor(clip), *([inception] if inception else [])]
        self.names = [e.name for e in self.extractors]
        self.words = clip.words(list(brief.prompts))  # refuses a CLIP without words
        self.notebook = Notebook(folder / POINTS)
        self._progress = progress or (lambda stage, done, total: None)
        self._reference: dict[tuple[str, int], np.ndarray] = {}

    def settings(
        self, name: str, generator: Generator, scale: float, steps: int, sampler: str | None
    ) -> Settings:
        """What a point of this sweep hangs on."""
        spec = generator.model.spec
        return Settings(
            model=name, weights=generator.model.digest, guidance_scale=scale, steps=steps,
            sampler=sampler or card_sampler(spec), size=self.brief.size or spec.native_size,
            prompts=self.brief.name, prompts_digest=self.brief.digest,
            features=tuple(self.names),
        )  # fmt: skip

    def measure(self, settings: Settings, generator: Generator) -> Point:
        """The point of these settings: from the notebook, or measured and written there."""
        if found := self.notebook.points.get(settings.key):
            return found
        made = self._made(settings, generator)
        distances = [
            metrics.METRICS[metric](made[e.name], self._compared(e, settings.size), e.name)
            for e in self.extractors
            for metric in DISTANCES
            if metric != "cmmd" or e is self.extractors[0]
        ]
        embed = self.extractors[0].name
        point = Point(
            settings=settings,
            distances=tuple(d for d in distances if isinstance(d, Measured)),
            clip_score=metrics.clip_score(made[embed], self.words, embed),
        )
        self.notebook.add(point)
        self._forget(settings)
        return point

    def _made(self, settings: Settings, generator: Generator) -> dict[str, np.ndarray]:
        """Features of the pictures, written batch by batch; the pictures are not kept."""
        generate = drawn(
            generator, steps=settings.steps, guidance_scale=settings.guidance_scale,
            sampler=settings.sampler, width=settings.size, height=settings.size,
            **unguarded(generator),
        )  # fmt: skip
        prompts, seeds = self.brief.prompts, self.brief.seeds
        kept = [RowFile(self.folder / f"{settings.key}-{i}.rows") for i in range(len(self.names))]
        done = min(len(rows) for rows in kept)
        for rows in kept:
            rows.cut(done)
        stage = f"{settings.model}, guidance {settings.guidance_scale:g}"
        for start in range(done, len(prompts), self.batch):
            some = slice(start, start + self.batch)
            pictures = generate(prompts[some], seeds[some])
            for extractor, rows in zip(self.extractors, kept, strict=True):
                rows.add(extractor(pictures))
            self._progress(stage, min(start + self.batch, len(prompts)), len(prompts))
        return {name: rows.read() for name, rows in zip(self.names, kept, strict=True)}

    def _forget(self, settings: Settings) -> None:
        """The features of a point that is written."""
        for i in range(len(self.names)):
            (self.folder / f"{settings.key}-{i}.rows").unlink(missing_ok=True)

    def _compared(self, extractor: Extractor, size: int) -> np.ndarray:
        """Features of the reference, kept beside the points."""
        key = (extractor.name, size)
        if key not in self._reference:
            told = json.dumps([*key, self.brief.digest])
            name = hashlib.sha256(told.encode()).hexdigest()[:16]
            file = self.folder / f"reference-{name}.npy"
            if file.exists():
                self._reference[key] = np.load(file, allow_pickle=False)
            else:
                self._reference[key] = extractor(self.brief.reference(size))
                part = file.with_suffix(".part")
                part.parent.mkdir(parents=True, exist_ok=True)
                with part.open("wb") as out:
                    np.save(out, self._reference[key])
                os.replace(part, file)
        return self._reference[key]


def front(points: Sequence[Point], metric: str, features: str) -> list[Point]:
    """Those that no other point beats in distance and CLIP score both."""
    spots = [(p.distance(metric, features).value, -p.clip_score.value) for p in points]
    best = []
    for point, (far, low) in zip(points, spots, strict=True):
        beaten = any(f <= far and w <= low and (f, w) != (far, low) for f, w in spots)
        if not beaten:
            best.append(point)
    return best


def table(points: Sequence[Point], metric: str, features: str) -> str:
    """The sweep in Markdown; a star marks the front."""
    best = {p.settings.key for p in front(points, metric, features)}
    lines = [
        f"| model | guidance | {metric} (95 %) | CLIP score (95 %) | front | sampler |",
        "|" + "---|" * 6,
    ]
    for p in points:
        s, star = p.settings, "*" if p.settings.key in best else ""
        far = p.distance(metric, features)
        how = f"{s.sampler}, {s.steps} steps, {s.size}²"
        lines.append(
            f"| {s.model} | {s.guidance_scale:g} | {far} | {p.clip_score} | {star} | {how} |"
        )
    about = ""
    if points:
        s = points[0].settings
        in_ = points[0].distance(metric, features).features
        about = f"\n{s.prompts}. {metric} in {in_}; CLIP score: {points[0].clip_score.convention} "
        about += f"in {points[0].clip_score.features}.\n"
    return "\n".join(lines) + "\n" + about


def check_plot() -> None:
    """Raises MissingExtra before the work, not behind it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtra("the figure", "eval") from error


def plot(points: Sequence[Point], metric: str, features: str, path: Path) -> None:
    """The figure: a line a model, its guidance scales beside the points, with 95 % intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), dpi=150)
    axes = figure.add_subplot()
    for model in dict.fromkeys(p.settings.model for p in points):
        line = sorted(
            (p for p in points if p.settings.model == model),
            key=lambda p: p.settings.guidance_scale,
        )
        far = [p.distance(metric, features) for p in line]
        near = [p.clip_score for p in line]
        axes.errorbar(
            [m.value for m in near], [m.value for m in far],
            xerr=_bars(near), yerr=_bars(far), marker="o", capsize=2, linewidth=1, label=model,
        )  # fmt: skip
        for x, y, p in zip(near, far, line, strict=True):
            axes.annotate(
                f"{p.settings.guidance_scale:g}", (x.value, y.value),
                textcoords="offset points", xytext=(5, 5), fontsize=7,
            )  # fmt: skip
    if points:
        axes.set_title(points[0].settings.prompts, fontsize=9)
        axes.set_xlabel(f"CLIP score, {points[0].clip_score.features}", fontsize=8)
        where = points[0].distance(metric, features).features
        axes.set_ylabel(f"{metric}, {where}", fontsize=8)
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")


def _bars(row: Sequence[Measured]) -> np.ndarray:
    """Distances to the ends of the intervals, ``(2, N)``."""
    ends = [m.interval or (m.value, m.value) for m in row]
    pairs = [
        (max(0, m.value - low), max(0, high - m.value))
        for m, (low, high) in zip(row, ends, strict=True)
    ]
    return np.array(pairs).T


def scales(text: str | None) -> tuple[float, ...]:
    """The cards' scales, or those of ``1.5,3,8``.

    Raises:
        InvalidRequest: not numbers, or outside 0 … 1000.
    """
    if text is None:
        return SCALES
    try:
        found = sorted({float(v) for v in text.split(",")})
    except ValueError:
        raise InvalidRequest("scales", f"{text!r} is not numbers.", "Write 1.5,3,8.") from None
    if not all(0 <= s <= 1000 for s in found):
        raise InvalidRequest("scales", f"{text!r}: a scale is outside 0..1000.")
    return tuple(found)
