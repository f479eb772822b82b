"""Around every HTTP request: ids, keys, the size and pace of bodies, counting, the log.

Plain ASGI, so that a client that leaves is noticed at once and nothing stands between an answer
and its reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from starlette.exceptions import HTTPException

from safelight.serve import logs
from safelight.serve.admission import Visit, visiting
from safelight.serve.house import House

log = logging.getLogger("safelight.serve")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN = ("/healthz", "/readyz")
"""Paths that need no key: whoever watches the server has none."""
_LINGER = 5.0  # seconds
_DIALECTS = {"/v1/inference": "deepinfra", "/score": "azureml", "/sdapi/": "a1111"}
_NATIVE = ("/v1/jobs", "/v1/capabilities")


def dialect(path: str) -> str:
    """Which interface a path belongs to."""
    for start, name in _DIALECTS.items():
        if path.startswith(start):
            return name
    if path.startswith(_NATIVE):
        return "native"
    return "openai" if path.startswith("/v1/") else "server"


def _open(request: Request) -> bool:
    """Whether a path needs no key: it has none, or a sign-in of its own."""
    path = request.url.path
    doors: list[str] = request.app.state.doors
    return path in (*OPEN, *doors) or any(d != "/" and path.startswith(d + "/") for d in doors)


async def _rest(receive: Receive, error: Exception) -> None:
    """Read on for a while what was too much, and let it go: a client that is still sending would
    see a broken connection instead of the answer."""
    if getattr(error, "status_code", 0) not in (401, 413):
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER):
            while (await receive()).get("more_body", False):
                pass


@dataclass
class _Seen:
    """What became of a request."""

    status: int = 0
    gone: bool = False
    sent: bool = False


class Outside:
    """The outermost layer.

    Args:
        app: what is inside.
        answer: an error as the dialect of the request's path has it.
    """

    def __init__(
        self,
        app: Callable[[Message, Receive, Send], Awaitable[None]],
        house: House,
        answer: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        self.app, self.house, self.answer = app, house, answer

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, began, seen = Request(scope), time.monotonic(), _Seen()
        given = request.headers.get("x-request-id", "")
        good = given.isascii() and given.isprintable() and 0 < len(given) <= 100
        request.state.id = given if good else secrets.token_hex(8)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                head = (b"x-request-id", request.state.id.encode())
                message["headers"] = [*message.get("headers", []), head]
            seen.sent = True
            await send(message)

        asker = self.house.keys.find(request.headers.get("authorization", ""))
        inside = self._bounded(request, receive, seen)
        with visiting(Visit(request.state.id, asker)):
            try:
                self._check(request, asker is not None)
                await self.app(scope, inside, sending)
            except Exception as error:
                if seen.sent or seen.gone:  # too late to say so; or nobody to say it to
                    log.warning("request %s broke off", request.state.id, exc_info=not seen.gone)
                else:
                    await _rest(receive, error)
                    await (await self.answer(request, error))(scope, inside, sending)
            finally:
                name = "" if asker is None else asker.name
                self._count(request, seen, name, time.monotonic() - began)

    def _check(self, request: Request, known: bool) -> None:
        """Raises:
        HTTPException: the request gets no further.
        """
        if self.house.keys.askers and not known and not _open(request):
            wrong = "Wrong or missing API key: Authorization: Bearer …"
            raise HTTPException(401, wrong, {"www-authenticate": "Bearer"})
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > self.house.settings.max_body:
            raise self._too_large()

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The body is over {self.house.settings.max_body:,} bytes.")

    def _bounded(self, request: Request, receive: Receive, seen: _Seen) -> Receive:
        """A body as long and as slow as is allowed; afterwards, whether the client has left."""
        settings, size, whole = self.house.settings, 0, False
        end = time.monotonic() + settings.body_seconds

        async def receiving() -> Message:
            nonlocal size, whole
            if whole:
                message = await receive()
            else:
                try:
                    message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
                except TimeoutError:
                    whole = True
                    raise HTTPException(408, "The body came too slowly.") from None
                size += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if size > settings.max_body:
                    whole = True
                    raise self._too_large()
            seen.gone |= message["type"] == "http.disconnect"
            return message

        return receiving

    def _count(self, request: Request, seen: _Seen, key: str, seconds: float) -> None:
        route = getattr(request.scope.get("route"), "path", "other")
        metrics = self.house.metrics
        metrics.requests.labels(route, seen.status).inc()
        metrics.seconds.labels(route).observe(seconds)
        code = getattr(request.state, "code", None)
        outcome = "gone" if seen.gone and not seen.sent else code or "ok"
        logs.event(
            log,
            "request",
            logging.DEBUG if request.url.path in (*OPEN, "/metrics") else logging.INFO,
            request_id=request.state.id,
            key=key or None,
            dialect=dialect(request.url.path),
            method=request.method,
            route=route,
            status=seen.status,
            outcome=outcome,
            seconds=round(seconds, 4),
        )
