"""Who is next: the order in which waiting jobs are taken. Pure: no threads, no clock of its own.

Higher standing first, then higher priority; among equals, whoever asks takes turns by the seconds
that they ask for (start-time fair queueing, Goyal, Vin and Cheng 1996, section 2), and one asker's
jobs go in order of arrival. A job that has waited longer than ``patience`` goes before all that,
oldest first. So the bound on waiting: ``patience`` seconds and the work of what came earlier,
whatever comes later, of whatever shape, size or priority.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Place(Generic[T]):
    item: T
    count: int
    rank: tuple[int, int]
    turn: float
    arrived: float
    number: int


class Line(Generic[T]):
    """Jobs that wait.

    Args:
        patience: seconds after which a job is overtaken by nothing that came later.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._places: list[_Place[T]] = []
        self._turns: dict[str, float] = {}
        self._now, self._number = 0.0, 0

    def __len__(self) -> int:
        return len(self._places)

    def push(
        self,
        item: T,
        *,
        now: float,
        count: int = 1,
        cost: float = 0.0,
        rank: tuple[int, int] = (0, 0),
        asker: str = "",
    ) -> None:
        """Have ``item`` wait.

        Args:
            now: seconds of a clock that never goes back.
            count: pictures; what :meth:`take`'s room is counted in.
            cost: seconds of work.
            rank: (standing, priority); higher goes first.
            asker: for whom; they take turns.
        """
        turn = max(self._now, self._turns.get(asker, 0.0))
        self._turns[asker] = turn + cost
        self._places.append(_Place(item, count, rank, turn, now, self._number))
        self._number += 1

    def order(self, now: float) -> list[T]:
        """Everything that waits, the next one first."""
        return [place.item for place in self._sorted(now)]

    def take(self, live: int, room: int, now: float) -> list[T]:
        """Remove and return those whose turn it is.

        The first is never overtaken by a smaller one: where it does not fit beside what is live,
        that ends first. What is larger than all the room goes alone.

        Args:
            live: pictures that run.
            room: most that may.
        """
        taken: list[T] = []
        if not self._places or (live and live >= room):
            return taken
        for place in self._sorted(now):
            if live and live + place.count > room:
                break
            taken.append(place.item)
            self._places.remove(place)
            self._now = max(self._now, place.turn)
            live += place.count
        if not self._places:
            self._turns.clear()
            self._now = 0.0
        return taken

    def drop(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Remove and return what nobody wants any more, wherever it stands."""
        gone = [place for place in self._places if unwanted(place.item)]
        if gone:
            self._places = [place for place in self._places if place not in gone]
        return [place.item for place in gone]

    def _sorted(self, now: float) -> list[_Place[T]]:
        def key(place: _Place[T]) -> tuple[float, ...]:
            if now - place.arrived > self.patience:
                return (0, place.arrived, place.number)
            standing, priority = place.rank
            return (1, -standing, -priority, place.turn, place.number)

        return sorted(self._places, key=key)
