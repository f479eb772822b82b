"""What a running call tells its caller, and how the caller stops it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from safelight.request import ImageResult

if TYPE_CHECKING:
    from PIL.Image import Image

    from safelight.engine import Progress as Answered


@dataclass(frozen=True)
class Progress:
    """One network call of one picture.

    Args:
        step, total: of this picture, from 1. Some samplers ask twice a step (Heun) or once more
            (PNDM): calls are counted.
        picture: its index in the call.
        seconds: since the call began.
        eta: seconds that the whole call is still expected to take.
        done: share of the whole call, 0..1.
    """

    step: int
    total: int
    picture: int
    seconds: float
    eta: float
    done: float


@dataclass(frozen=True)
class Preview:
    """What a picture looks like so far."""

    image: Image
    picture: int
    step: int


Event = Progress | Preview | ImageResult


class Cancel:
    """A token that stops a call within one step, from any thread."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Stop. What is finished is kept."""
        self._event.set()

    @property
    def is_set(self) -> bool:
        """Whether somebody has."""
        return self._event.is_set()


@dataclass
class Clock:
    """Network calls done and to do."""

    total: int
    began: float = field(default_factory=time.monotonic)
    done: int = 0

    def tick(self, answered: Answered, picture: int) -> Progress:
        """One more is done."""
        self.done += 1
        seconds = time.monotonic() - self.began
        eta = seconds / self.done * max(0, self.total - self.done)
        share = min(1.0, self.done / max(1, self.total))
        return Progress(answered.index + 1, answered.total, picture, seconds, eta, share)
