"""What was found in a picture or a prompt, and what was done about it. No torch.

Who finds is elsewhere (:mod:`safelight.nets.safety_head`, a moderation service), who decides is
:mod:`safelight.safety`, who acts is :mod:`safelight.generate.guard`. These are the records that
pass between them and end in the result, in JSON and in a picture's metadata.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from safelight.spec import Record

Policy = Literal["off", "flag", "blur", "black", "reject"]
"""What to do with a picture that the safety checker flags. ``off``: do not look."""
POLICIES: tuple[str, ...] = get_args(Policy)

Category = Literal["hate", "self_harm", "sexual", "violence"]
CATEGORIES: tuple[str, ...] = get_args(Category)


class Score(Record):
    """How near a picture is to one concept."""

    name: str
    score: float | None
    """Similarity minus threshold, to three decimals: above 0 is too near. None: not a number."""
    threshold: float
    special: bool = False
    """Only makes the other concepts stricter."""


class Verdict(Record):
    """What the safety checker said of a picture.

    ``nsfw`` is None where nobody looked: never read it as false.
    """

    policy: Policy
    nsfw: bool | None = None
    action: Literal["none", "blurred", "blackened", "removed"] = "none"
    checker: str = ""
    """The first digits of the checker's digest."""
    scores: tuple[Score, ...] = ()

    @property
    def reason(self) -> str:
        """The concepts that were too near, for people."""
        if any(score.score is None for score in self.scores):
            return "its scores are not numbers, which is never safe"
        near = [s.name for s in self.scores if not s.special and (s.score or 0) > 0]
        return ", ".join(near)


class Moderated(Record):
    """What a moderation service said of one item."""

    item: Literal["prompt", "picture"]
    severity: dict[Category, int] = Field(default_factory=dict)
    """0 (none) to 7 (worst) by category; empty where there is no answer."""
    threshold: dict[Category, int] = Field(default_factory=dict)
    removed: bool = False
    reason: str = ""
