"""The device goes round: models of one server take turns on it, in the order that they ask."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that is handed on in order of asking, which an ordinary one does not promise.

    Two models that compute at once would each be slower than half: every thread that computes has
    a team of OpenMP workers of its own.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._given = self._served = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for one's turn, and have it until the block ends."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def pass_on(self) -> None:
        """From within a turn: let everybody who waits have one first."""
        if self._given - self._served > 1:
            self._leave()
            self._enter()

    def _enter(self) -> None:
        with self._condition:
            mine = self._given
            self._given += 1
            self._condition.wait_for(lambda: self._served == mine)

    def _leave(self) -> None:
        with self._condition:
            self._served += 1
            self._condition.notify_all()
