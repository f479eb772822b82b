"""A running server over a toy model, and a plain HTTP client."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from micro_systems import system
from safelight.generate import Generator
from safelight.serve.app import create_app
from safelight.serve.house import House, Settings


def toy_house(*, model: Any = None, **settings: Any) -> House:
    """A house whose models are all one micro model with real networks, for every dialect."""
    settings.setdefault("models", ("toy", "owner/other"))
    settings.setdefault("measure", False)
    settings.setdefault("azureml", True)
    settings.setdefault("without_checker", True)
    made = model or system("sd-v1").model
    return House(Settings(**settings), loader=lambda *_, **__: Generator(made))


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)


@dataclass(frozen=True)
class Client:
    """Speaks to one server."""

    url: str
    house: House

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method)
        request.add_header("content-type", "application/json")
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, dict(answer.headers.items()), answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, dict(error.headers.items()), error.read())

    def get(self, path: str, **more: Any) -> Answer:
        return self.ask("GET", path, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> Answer:
        return self.ask("POST", path, {} if body is None else body, **more)

    def done(self, job: str, timeout: float = 30) -> dict[str, Any]:
        """Poll until a job is final."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            told = self.get(f"/v1/jobs/{job}").json
            if told["status"] in ("completed", "failed", "cancelled"):
                return told
            time.sleep(0.02)
        raise AssertionError(f"job {job} did not end: {told}")


@contextmanager
def serving(house: House) -> Iterator[Client]:
    """A server on a free port of this machine, in a thread."""
    config = uvicorn.Config(
        create_app(house=house), host="127.0.0.1", port=0, log_level="error", access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Client(f"http://127.0.0.1:{port}", house)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
