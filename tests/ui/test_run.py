"""Following jobs: progress, previews, cancelling, refusals; one and many."""

from __future__ import annotations

import pytest

from fake_server import STEPS, FakeClient
from safelight.errors import InvalidRequest
from safelight.serve.client import Full
from safelight.ui import views
from safelight.ui.run import FLIGHT, Seen, Stop, follow

BODY = {"prompt": "a red cube", "count": 2, "preview_every": 1, "steps": 4}


def every(client: FakeClient, bodies: list, stop: Stop | None = None) -> list[Seen]:
    return list(follow(client, bodies, stop or Stop(), every=0))


def test_a_run_tells_how_far_it_is() -> None:
    seen = every(FakeClient(), [BODY])
    assert [each.step for each in seen[:-1]] == [1, 2, 3]
    assert seen[1].preview is not None
    assert seen[-1].status == "completed"
    assert [shot.seed for shot in seen[-1].shots] == [5, 6]
    assert all(shot.data for shot in seen[-1].shots)
    assert "Step 2 of 4" in views.stage(seen[1])
    assert "about 2 s to go" in views.stage(seen[1])


def test_the_place_in_the_queue_is_told() -> None:
    assert "2 ahead in the queue" in views.words(Seen(position=2, eta=9.0))
    assert "about 9 s" in views.words(Seen(position=2, eta=9.0))


def test_cancelling_ends_it() -> None:
    client, stop = FakeClient(), Stop()
    run = follow(client, [BODY], stop, every=0)
    next(run)
    stop.set()
    last = list(run)[-1]
    assert last.status == "cancelled"
    assert client.cancelled == ["job-0"]
    assert "Cancelled" in views.stage(last)
    assert client.looks[0] < STEPS


def test_leaving_cancels() -> None:
    client = FakeClient()
    run = follow(client, [BODY], Stop(), every=0)
    next(run)
    run.close()
    assert client.cancelled == ["job-0"]


def test_a_refusal_is_raised() -> None:
    client = FakeClient()
    client.refuse = InvalidRequest("steps", "0 is too few.")
    with pytest.raises(InvalidRequest, match="steps"):
        every(client, [BODY])


def test_a_grid_keeps_the_server_busy_but_not_flooded() -> None:
    client = FakeClient()
    bodies = [{**BODY, "count": 1, "seed": k} for k in range(FLIGHT + 5)]
    seen = every(client, bodies)
    assert max(sum(0 < n < STEPS for n in client.looks) for _ in seen) <= FLIGHT
    assert seen[0].total == FLIGHT + 5
    assert [shot.seed for shot in seen[-1].shots] == list(range(FLIGHT + 5))
    assert seen[-1].progress == 1


def test_in_a_grid_one_refused_cell_is_one_missing_picture() -> None:
    class Picky(FakeClient):
        def submit(self, body):
            if body["seed"] == 1:
                raise InvalidRequest("strength", "needs an image.")
            return super().submit(body)

    seen = every(Picky(), [{**BODY, "count": 1, "seed": k} for k in range(3)])
    assert [shot.outcome for shot in seen[-1].shots] == ["ok", "refused", "ok"]
    assert "needs an image" in views.stage(seen[-1])


def test_a_full_queue_is_waited_for_in_a_grid() -> None:
    class Busy(FakeClient):
        times = 0

        def submit(self, body):
            self.times += 1
            if self.times == 2:
                raise Full("full", 0.0)
            return super().submit(body)

    seen = every(Busy(), [{**BODY, "count": 1, "seed": k} for k in range(3)])
    assert len(seen[-1].shots) == 3


def test_flagged_pictures_say_so() -> None:
    client = FakeClient()
    client.flag = True
    html = views.stage(every(client, [BODY])[-1])
    assert "flagged by the safety checker" in html
    assert "It is black." in html


def test_what_strangers_wrote_is_escaped() -> None:
    assert "<script>" not in views.refused("<script>", "<script>")
    assert "<script>" not in views.details({"request": {"prompt": "<script>"}})
    assert "<script>" not in views.listed(["<script>"])
    assert "<b>Steps</b> is wrong" in views.refused("steps", "is wrong")
