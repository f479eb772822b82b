"""Who is next, on the pure logic: nothing lost, nothing overtaken for ever, fair shares."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.serve.line import Line
from safelight.serve.turns import Turns

PATIENCE = 10.0


@dataclass(frozen=True)
class Asked:
    """One that waits."""

    number: int
    arrived: float
    count: int
    rank: tuple[int, int]
    asker: str
    cost: float


@st.composite
def stories(draw: st.DrawFn) -> list[tuple[float, Asked | int]]:
    """(time, who comes) or (time, how many pictures are live when the worker looks)."""
    now, story = 0.0, []
    for number in range(draw(st.integers(1, 40))):
        now += draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 20.0]))
        if draw(st.booleans()):
            asked = Asked(
                number,
                now,
                draw(st.integers(1, 9)),
                (draw(st.integers(0, 2)), draw(st.integers(0, 2))),
                draw(st.sampled_from("ab")),
                draw(st.sampled_from([0.0, 1.0, 7.0])),
            )
            story.append((now, asked))
        else:
            story.append((now, draw(st.integers(0, 8))))
    return story


def push(line: Line[Asked], asked: Asked) -> None:
    line.push(
        asked,
        now=asked.arrived,
        count=asked.count,
        cost=asked.cost,
        rank=asked.rank,
        asker=asked.asker,
    )


@given(stories())
@settings(max_examples=150)
def test_random_arrivals(story: list[tuple[float, Asked | int]]) -> None:
    line: Line[Asked] = Line(PATIENCE)
    room, waiting, taken = 8, set[Asked](), list[Asked]()
    for now, what in [*story, *[(1e6, 0)] * len(story)]:
        if isinstance(what, Asked):
            push(line, what)
            waiting.add(what)
            continue
        live, got = what, line.take(what, room, now)
        assert got or not waiting or live, "an idle device takes what there is"
        for one in got:
            waiting.remove(one)  # once, and only what has come
            overdue = [each for each in waiting if now - each.arrived > PATIENCE]
            assert not any(
                (each.arrived, each.number) < (one.arrived, one.number) for each in overdue
            ), "the patient are overtaken by nobody who came later"
            alike = [e for e in waiting if (e.rank, e.asker) == (one.rank, one.asker)]
            assert all(one.number < each.number for each in alike), "one asker's in order"
        total = live + sum(one.count for one in got)
        assert total <= room or (live == 0 and len(got) == 1)
        taken += got
        assert len(line) == len(waiting)
    assert not waiting
    assert len(taken) == len(set(taken))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 8)), max_size=60))
def test_the_bound_on_waiting(others: list[tuple[int, int]]) -> None:
    """However urgent, large and many those are that come later: after ``patience`` only what came
    before is taken first. One is taken a second, one comes a second."""
    line: Line[Asked] = Line(PATIENCE)
    before = [Asked(k, 0.0, 8, (0, 0), "b", 1.0) for k in range(3)]
    one = Asked(3, 0.0, 1, (0, 0), "a", 100.0)
    for each in (*before, one):
        push(line, each)
    for second in range(1, 60):
        standing, count = others[second] if second < len(others) else (5, 8)
        push(line, Asked(100 + second, float(second), count, (standing, 5), "c", 0.01))
        if one in line.take(0, 1, float(second)):
            break
    assert second <= PATIENCE + 1 + len(before) + 1


def test_without_patience_it_would_wait_for_ever() -> None:
    line: Line[Asked] = Line(1e9)
    one = Asked(0, 0.0, 1, (0, 0), "a", 1.0)
    push(line, one)
    for second in range(1, 200):
        push(line, Asked(second, float(second), 1, (1, 0), "b", 1.0))
        assert one not in line.take(0, 1, float(second))


def test_askers_take_turns_by_the_seconds_that_they_ask_for() -> None:
    line: Line[str] = Line(PATIENCE)
    for k in range(6):
        line.push(f"a{k}", now=0, cost=1, asker="a")
    for k in range(6):
        line.push(f"b{k}", now=0, cost=2, asker="b")
    order = line.order(0)
    assert order[:6] == ["a0", "b0", "a1", "a2", "b1", "a3"]
    assert order == line.take(0, 100, 0)


def test_a_newcomer_does_not_catch_up_on_what_it_did_not_ask_for() -> None:
    line: Line[str] = Line(PATIENCE)
    for k in range(10):
        line.push(f"a{k}", now=0, cost=1, asker="a")
    assert line.take(0, 5, 0) == [f"a{k}" for k in range(5)]
    for k in range(3):
        line.push(f"b{k}", now=1, cost=1, asker="b")
    assert line.order(1)[:4] == ["b0", "a5", "b1", "a6"]


def test_a_large_one_is_not_overtaken_by_small_ones() -> None:
    line: Line[str] = Line(PATIENCE)
    line.push("large", now=0, count=8)
    line.push("small", now=0, count=1)
    assert line.take(4, 8, 0) == []
    assert line.take(0, 8, 0) == ["large"]
    assert line.take(8, 8, 0) == []
    assert line.take(7, 8, 0) == ["small"]


def test_what_nobody_wants_leaves() -> None:
    line: Line[int] = Line(PATIENCE)
    for k in range(5):
        line.push(k, now=0)
    assert line.drop(lambda k: k % 2 == 1) == [1, 3]
    assert line.take(0, 9, 0) == [0, 2, 4]


def test_turns_are_handed_on_in_the_order_of_asking() -> None:
    """So everybody waits for at most one turn of each other."""
    turns, order, threads = Turns(), list[int](), list[threading.Thread]()

    def work(name: int) -> None:
        for _ in range(3):
            with turns.turn():
                order.append(name)
                # The next turn is another's: wait until this one could have asked again.
                time.sleep(0.001)

    with turns.turn():
        for name in range(4):
            threads.append(threading.Thread(target=work, args=(name,)))
            threads[-1].start()
            while turns._given < name + 2:
                time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    assert order[:4] == [0, 1, 2, 3]
    assert sorted(order) == sorted([0, 1, 2, 3] * 3)


def test_a_turn_can_be_passed_on() -> None:
    turns, order = Turns(), list[str]()
    inside = threading.Event()

    def other() -> None:
        inside.set()
        with turns.turn():
            order.append("other")

    with turns.turn():
        turns.pass_on()  # nobody waits
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(5)
        while turns._given - turns._served < 2:
            time.sleep(0.001)
        order.append("before")
        turns.pass_on()
        order.append("after")
    thread.join()
    assert order == ["before", "other", "after"]
