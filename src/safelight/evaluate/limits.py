"""A model's biases and limits, drawn: the cards' lists of them as prompts, sheets and counts.

The counts are zero-shot guesses of a CLIP (Radford et al. 2021, 2103.00020, section 3.1): of the
sentences of a question, the one nearest to the picture. CLIP has biases of its own, and is weak at
exactly what composition asks for. Read a count as "looks so to CLIP", and look at the sheet. Of
people it guesses how a picture presents them, which is all that a picture of nobody can have.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field, ValidationError

from safelight.data.clip import CLIP
from safelight.errors import InvalidRequest
from safelight.evaluate.metrics import CLIP_SCORE_WEIGHT, Measured, student
from safelight.evaluate.score import Share
from safelight.generate import Generator
from safelight.spec import Record

DEFAULT = "lists/limits.toml"


class Question(Record):
    """What CLIP is asked about each picture of a section."""

    name: str
    answers: dict[str, str] = Field(min_length=2)
    """Answers to sentences; {} is the case's filling."""


class Case(Record):
    """A prompt, and what is known of it."""

    label: str
    prompt: str = Field(min_length=1)
    means: str = ""
    """The same in English: what the pictures are scored against."""
    against: tuple[str, ...] = ()
    """Sentences that a right picture is nearer to its prompt than to."""


class Section(Record):
    """One limit, one sheet."""

    name: str = Field(pattern=r"^[\w-]+$")
    title: str
    card: str = ""
    """What the cards say."""
    template: str = ""
    fill: tuple[str, ...] = ()
    cases: tuple[Case, ...] = ()
    questions: tuple[Question, ...] = ()
    choose_own: bool = False
    """Each filling is right against all others."""

    def all_cases(self) -> list[Case]:
        """The cases, those of the template first."""
        made = []
        for filling in self.fill:
            prompt = self.template.replace("{}", filling)
            others = [self.template.replace("{}", f) for f in self.fill if f != filling]
            against = tuple(others) if self.choose_own else ()
            made.append(Case(label=filling, prompt=prompt, against=against))
        return [*made, *self.cases]


@dataclass
class Row:
    """What came of one case."""

    case: Case
    pictures: list[Image.Image | None]
    """None where there is none."""
    seeds: list[int]
    flagged: list[bool]
    answers: dict[str, dict[str, int]] = field(default_factory=dict)
    """By question, how many pictures got which answer."""
    right: Share | None = None
    """Nearer to the prompt than to what it stands against."""
    score: Measured | None = None
    """CLIP score against the English meaning."""
    less: Measured | None = None
    """Its difference to the English prompt's, by picture of one seed."""
    scores: np.ndarray | None = None

    @property
    def seen(self) -> list[int]:
        """Places of the pictures that count: made, and not flagged."""
        return [i for i, p in enumerate(self.pictures) if p is not None and not self.flagged[i]]


def load(path: str | Path | None = None, names: Sequence[str] | None = None) -> list[Section]:
    """Sections of a TOML file, or of the one that comes with Safelight.

    Args:
        names: only these.

    Raises:
        InvalidRequest: the file or a name is wrong.
    """
    file: Any = files("safelight.evaluate").joinpath(DEFAULT) if path is None else Path(path)
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        sections = [Section.model_validate(one) for one in data["section"]]
    except FileNotFoundError:
        raise InvalidRequest("templates", f"no file {file}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest("templates", f"{file}: {where}: {first['msg']}.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest("templates", f"{file}: {error}.") from error
    for section in sections:
        if bool(section.template) != bool(section.fill) or not section.all_cases():
            problem = f"{file}: {section.name} needs a template with fill, or cases."
            raise InvalidRequest("templates", problem)
    known = [s.name for s in sections]
    if wrong := [n for n in names or [] if n not in known]:
        raise InvalidRequest("section", f"no section {wrong[0]!r}.", f"One of {', '.join(known)}.")
    return [s for s in sections if names is None or s.name in names]


def draw(
    section: Section,
    generator: Generator,
    *,
    count: int = 4,
    seed: int = 0,
    batch: int = 50,
    progress: Callable[[int], None] | None = None,
    **wishes: Any,
) -> list[Row]:
    """Pictures of a section's cases, ``count`` each, all with the same seeds.

    Args:
        seed: of each case's first picture.
        batch: pictures a call.
        progress: called with the number of pictures since the last call.
        wishes: fields of a request, for every picture; None leaves the card's.
    """
    wishes = {name: value for name, value in wishes.items() if value is not None}
    rows = [Row(case, [], [], []) for case in section.all_cases()]
    order = [(row, seed + k) for row in rows for k in range(count)]
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        results = generator.generate(
            [row.case.prompt for row, _ in some], seed=[s for _, s in some], count=1, **wishes
        )
        for (row, number), result in zip(some, results, strict=True):
            row.pictures.append(result.image)
            row.seeds.append(number)
            row.flagged.append(bool(result.nsfw))
        if progress is not None:
            progress(len(some))
    return rows


def count(section: Section, rows: Sequence[Row], clip: CLIP) -> None:
    """Put a CLIP's guesses into the rows."""
    for row in rows:
        shown = [p for i in row.seen if (p := row.pictures[i]) is not None]
        if not shown:
            continue
        pictures = clip.pictures(shown)
        filling = row.case.label if row.case.label in section.fill else row.case.prompt
        for question in section.questions:
            words = [text.replace("{}", filling) for text in question.answers.values()]
            said = (pictures @ clip.words(words).T).argmax(1)
            names = list(question.answers)
            row.answers[question.name] = {
                name: int((said == i).sum()) for i, name in enumerate(names)
            }
        if row.case.against:
            near = pictures @ clip.words([row.case.prompt, *row.case.against]).T
            row.right = Share.of(near[:, 0] > near[:, 1:].max(1))
        if row.case.means:
            near = pictures @ clip.words([row.case.means])[0]
            row.scores = np.full(len(row.pictures), np.nan)
            row.scores[row.seen] = CLIP_SCORE_WEIGHT * np.maximum(near, 0)
            row.score = _mean("clip_score", row.scores[row.seen], clip)
    english = {row.case.prompt: row for row in rows if row.case.means == row.case.prompt}
    for row in rows:
        base = english.get(row.case.means)
        if base is None or base is row or base.scores is None or row.scores is None:
            continue
        apart = row.scores - base.scores  # pictures of one seed
        row.less = _mean("clip_score_difference", apart[np.isfinite(apart)], clip)


def _mean(metric: str, values: np.ndarray, clip: CLIP) -> Measured | None:
    if not len(values):
        return None
    return Measured(
        metric=metric, value=float(values.mean()), interval=student(values),
        how="Student, over pictures", features=f"clip:{clip.name}@{clip.digest[:12]}",
        pictures=len(values), convention=f"{CLIP_SCORE_WEIGHT:g} max(cos, 0)",
    )  # fmt: skip
