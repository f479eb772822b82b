"""Asking a moderation service: the prompt before generation, the picture after it.

As the AzureML card of SD v1-5 has it with Azure AI Content Safety: four categories, severities
0 to 7, and an item whose severity is above the threshold (2 online, 1 in batch) is removed. It
fails closed: no answer in time, an error or an answer that makes no sense removes the item too.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

from PIL.Image import Image

from safelight.errors import InvalidRequest
from safelight.verdict import CATEGORIES, Category, Moderated

log = logging.getLogger(__name__)

ONLINE = 2
"""The card's threshold for an online endpoint."""
BATCH = 1
"""And for a batch endpoint."""
WORST = 7


class Moderator(Protocol):
    """Someone who can judge. Called from a thread of its own; should have a timeout itself, since
    a call that is given up goes on in the background."""

    def prompt(self, text: str) -> Mapping[str, int]:
        """Severity 0..7 of every category (:data:`safelight.verdict.CATEGORIES`)."""
        ...

    def picture(self, image: Image) -> Mapping[str, int]:
        """The same of a picture."""
        ...


@dataclass(frozen=True)
class Moderation:
    """A moderator, and what to remove.

    Args:
        threshold: an item above it is removed; one for all categories, or one each.
        timeout: seconds to wait for an answer.
        prompts, pictures: what to ask about. Negative prompts say what a picture should *not*
            show and are not asked about.
    """

    moderator: Moderator
    threshold: int | Mapping[str, int] = ONLINE
    timeout: float = 10.0
    prompts: bool = True
    pictures: bool = True
    _limits: dict[Category, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = self.threshold
        limits = dict(given) if isinstance(given, Mapping) else dict.fromkeys(CATEGORIES, given)
        if set(limits) != set(CATEGORIES):
            raise InvalidRequest(
                "threshold", f"names {sorted(limits)}.", f"All of {', '.join(CATEGORIES)}."
            )
        for limit in limits.values():
            if not _is_severity(limit):
                raise InvalidRequest("threshold", f"must be 0 to {WORST}, not {limit!r}.")
        if not 0 < self.timeout < 3600:
            raise InvalidRequest("timeout", f"must be seconds above 0, not {self.timeout!r}.")
        object.__setattr__(self, "_limits", limits)

    def of_prompt(self, text: str) -> Moderated:
        """Ask about a prompt. Never raises for what the service does."""
        return self._ask("prompt", lambda: self.moderator.prompt(text))

    def of_picture(self, image: Image) -> Moderated:
        """Ask about a picture. Never raises for what the service does."""
        return self._ask("picture", lambda: self.moderator.picture(image))

    def _ask(
        self, item: Literal["prompt", "picture"], call: Callable[[], Mapping[str, int]]
    ) -> Moderated:
        def removed(reason: str, severity: Mapping[Category, int] | None = None) -> Moderated:
            return Moderated(
                item=item,
                severity=dict(severity or {}),
                threshold=self._limits,
                removed=True,
                reason=reason,
            )

        answer = _within(self.timeout, call)
        if isinstance(answer, _Failed):
            return removed(f"the {item} could not be moderated: {answer.reason}")
        if (
            not isinstance(answer, Mapping)
            or set(answer) != set(CATEGORIES)
            or not all(map(_is_severity, answer.values()))
        ):
            return removed(f"the {item} could not be moderated: the answer makes no sense")
        severity = cast(Mapping[Category, int], answer)
        above = [
            f"{name} {severity[name]} (above {limit})"
            for name, limit in self._limits.items()
            if severity[name] > limit
        ]
        if above:
            return removed(f"the {item} was moderated: {', '.join(above)}", severity)
        return Moderated(item=item, severity=dict(severity), threshold=self._limits)


@dataclass(frozen=True)
class _Failed:
    reason: str


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What ``call`` returns; a :class:`_Failed` when it raises or takes too long."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put(call())
        except Exception as error:  # closed, whatever it is; the text may quote the prompt
            log.warning("the moderator failed: %s", type(error).__name__)
            answers.put(_Failed(type(error).__name__))

    threading.Thread(target=run, name="safelight-moderation", daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return _Failed(f"no answer within {seconds:g} seconds")


def _is_severity(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= WORST
