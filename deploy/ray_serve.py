"""``safelight serve`` on Ray Serve: replicas, health checks, restarts.

    serve run deploy.ray_serve:app model=tiny replicas=2

from a checkout, with ``pip install 'safelight[serve,ray]'``. Arguments are fields of
:class:`safelight.serve.house.Settings` (``model`` may name several, with commas), and
``replicas``, ``cpus`` and ``gpus`` of each.

A replica takes requests when its first model is loaded. Each keeps its jobs and options to itself,
so interfaces that ask about an earlier request work with one replica, and are refused by name
with more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from ray import serve

from safelight.errors import InvalidRequest
from safelight.serve.app import create_app, error_body
from safelight.serve.house import House, Settings

REMEMBERING = (
    "/v1/jobs",
    *(f"/sdapi/v1/{name}" for name in ("progress", "interrupt", "skip", "options")),
)
"""Paths that ask about what one process remembers."""
_LISTS = ("models", "lora_dir", "embedding_dir", "api_keys")
_NAMES = {"model": "models", "api_key": "api_keys"}


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """The application, as ``serve run`` calls it.

    Raises:
        InvalidRequest: an argument that is unknown, or a wrong value.
    """
    settings, replicas, options = read(arguments)

    def build() -> FastAPI:  # on the replica
        return application(settings, replicas)

    @serve.deployment(
        name="safelight",
        num_replicas=replicas,
        max_ongoing_requests=1000,  # the server's own queue refuses what is too much
        health_check_period_s=10,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=settings.drain_seconds + 10,
        ray_actor_options=options,
    )
    @serve.ingress(build)
    class Server:
        """One replica."""

        def check_health(self) -> None:
            """Ray replaces a replica for which this raises."""
            healthy(self.app.state.house)  # type: ignore[attr-defined]  # the ingress brings it

    return Server.bind()


def application(settings: Settings, replicas: int = 1, house: House | None = None) -> FastAPI:
    """A replica's application, its first model loaded."""
    house = house or House(settings)
    house.worker(None)
    made = create_app(house=house)
    if replicas > 1:
        made.middleware("http")(_refuse_what_needs_one)
    return made


def healthy(house: House) -> None:
    """Say nothing where the first model is ready.

    Raises:
        RuntimeError: it is not.
    """
    if house.default not in house.loaded():
        raise RuntimeError(f"{house.default} is not loaded")


async def _refuse_what_needs_one(
    request: Request, call_next: Callable[[Request], Awaitable[Response]]
) -> Response:
    path = request.url.path
    if any(path == each or path.startswith(f"{each}/") for each in REMEMBERING):
        message = f"{path} asks what one process remembers. Start with replicas=1."
        return error_body(request, 501, "needs_one_replica", message, "")
    return await call_next(request)


def read(arguments: Mapping[str, Any]) -> tuple[Settings, int, dict[str, Any]]:
    """Settings, replicas, and what Ray gives each of them.

    Raises:
        InvalidRequest: an argument that is unknown, or a wrong value.
    """
    given = {_NAMES.get(name, name): value for name, value in arguments.items()}
    try:
        replicas = int(given.pop("replicas", 1))
        options = {"num_cpus": float(given.pop("cpus", 1)), "num_gpus": float(given.pop("gpus", 0))}
    except ValueError as error:
        raise InvalidRequest("replicas", f"{error}.", "Write numbers.") from None
    if replicas < 1:
        raise InvalidRequest("replicas", f"must be at least 1, not {replicas}.")
    for name in set(given) - set(Settings.model_fields):
        known = ", ".join(sorted(Settings.model_fields))
        raise InvalidRequest(name, "is no setting.", f"Known: {known}.")
    for name in _LISTS:
        if isinstance(given.get(name), str):
            given[name] = tuple(part for part in given[name].split(",") if part)
    try:
        return Settings(**given), replicas, options
    except ValueError as error:
        raise InvalidRequest("settings", str(error)) from None
