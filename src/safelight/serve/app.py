"""The HTTP application: limits, keys, errors, metrics and health around the dialects."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from safelight import __version__
from safelight.errors import InvalidRequest, ModelNotFound, SafelightError
from safelight.serve.dialects import a1111, a1111_lists, azureml, deepinfra, native, openai
from safelight.serve.house import House, Settings
from safelight.serve.jobs import Busy, Draining, Late

log = logging.getLogger("safelight.serve")
OPEN = ("/healthz", "/readyz")
"""Paths that need no key: whoever watches the server has none."""


def create_app(settings: Settings | None = None, *, house: House | None = None) -> FastAPI:
    """The application.

    Args:
        house: instead of a new one of the settings.
    """
    house = house or House(settings or Settings())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(asyncio.to_thread(_start, house))
        app.state.loading = loading
        yield
        await asyncio.to_thread(house.close)

    app = FastAPI(
        title="Safelight",
        version=__version__,
        summary="Stable Diffusion: one port, every client.",
        lifespan=lifespan,
    )
    app.state.house, app.state.metrics = house, Metrics(house)
    app.state.a1111, app.state.a1111_options = {}, {}
    app.state.doors = []  # paths with a sign-in of their own, which takes the same keys
    for dialect in (native, openai, deepinfra, azureml, a1111, a1111_lists):
        app.include_router(dialect.router)
    app.middleware("http")(_outside)
    for kind in (SafelightError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer)

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> Response:
        """The first model is loaded."""
        ready = house.default in house.loaded()
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        """For Prometheus."""
        return PlainTextResponse(app.state.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def _start(house: House) -> None:
    """Load the first model, and take up again what a crash has left."""
    house.worker(None)
    left = native.restore(house)
    if left:
        log.warning("%d jobs of before are taken up again", left)


class Metrics:
    """What the server counts. A registry of its own: several servers may live in one process."""

    def __init__(self, house: House) -> None:
        self._house, self.registry = house, CollectorRegistry()
        self.requests = Counter(
            "safelight_requests", "HTTP requests.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "safelight_request_seconds", "Time to answer.", ["route"], registry=self.registry
        )
        self.refused = Counter(
            "safelight_refused", "Requests refused.", ["reason"], registry=self.registry
        )
        labels: Sequence[str] = ["model"]
        self._queued = Gauge("safelight_queued_jobs", "Waiting.", labels, registry=self.registry)
        self._running = Gauge("safelight_running_jobs", "Running.", labels, registry=self.registry)
        self._backlog = Gauge(
            "safelight_backlog_seconds", "Expected work.", labels, registry=self.registry
        )
        self._ticks = Gauge("safelight_ticks", "Engine ticks.", labels, registry=self.registry)
        self._calls = Gauge("safelight_calls", "Network calls.", labels, registry=self.registry)

    def text(self) -> bytes:
        """Everything as Prometheus reads it."""
        for name, worker in self._house.loaded().items():
            queued, running = worker.depth
            self._queued.labels(name).set(queued)
            self._running.labels(name).set(running)
            self._backlog.labels(name).set(worker.backlog)
            self._ticks.labels(name).set(worker.generator.engine.ticks)
            self._calls.labels(name).set(worker.generator.engine.calls)
        return generate_latest(self.registry)


# -- around every request -------------------------------------------------------------------------


async def _outside(
    request: Request, call_next: Callable[[Request], Awaitable[Response]]
) -> Response:
    """Request ids, keys, the size of bodies; counting."""
    state, began = request.app.state, time.monotonic()
    given = request.headers.get("x-request-id", "")
    request.state.id = given if given.isascii() and 0 < len(given) <= 100 else secrets.token_hex(8)
    refusal = _refused(request, state.house.settings)
    if refusal is not None:
        response: Response = error_body(request, *refusal)
    else:
        response = await call_next(request)
    route = getattr(request.scope.get("route"), "path", "other")
    state.metrics.requests.labels(route, response.status_code).inc()
    state.metrics.seconds.labels(route).observe(time.monotonic() - began)
    response.headers["x-request-id"] = request.state.id
    log.info("%s %s %s %d", request.state.id, request.method, route, response.status_code)
    return response


def _open(path: str, doors: Sequence[str]) -> bool:
    return path in (*OPEN, *doors) or any(path.startswith(f"{door}/") for door in doors if door[1:])


def _refused(request: Request, settings: Settings) -> tuple[int, str, str, str] | None:
    """(status, code, message, field), where the request gets no further."""
    if settings.api_keys and not _open(request.url.path, request.app.state.doors):
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        good = kind.lower() == "bearer" and any(
            hmac.compare_digest(key.strip().encode(), each.encode()) for each in settings.api_keys
        )
        if not good:
            return 401, "invalid_api_key", "Wrong or missing API key: Authorization: Bearer …", ""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > settings.max_body:
        return 413, "too_large", f"The body is over {settings.max_body:,} bytes.", ""
    if request.method in ("POST", "PUT") and not length:
        return 411, "length_required", "Send a Content-Length.", ""
    return None


async def _answer(request: Request, error: Exception) -> Response:
    """Every error in the form of the dialect that was spoken."""
    metrics: Metrics = request.app.state.metrics
    headers: dict[str, str] = {"x-should-retry": "false"}
    field = ""
    if isinstance(error, InvalidRequest):
        status, code, message, field = 400, "invalid_value", str(error), error.field
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body")
        status, code, message = 400, "invalid_value", f"{field or 'body'}: {first['msg']}"
    elif isinstance(error, ModelNotFound):
        status, code, message, field = 404, "model_not_found", str(error), "model"
    elif isinstance(error, Busy):
        status, code, message = 429, "queue_full", str(error)
        headers = {"retry-after": f"{error.retry_after:.0f}", "x-should-retry": "true"}
    elif isinstance(error, Draining):
        status, code, message = 503, "shutting_down", str(error)
        headers = {"retry-after": "5", "x-should-retry": "true"}
    elif isinstance(error, Late):
        status, code, message = 504, "deadline_exceeded", str(error)
    elif isinstance(error, HTTPException):
        status, code, message = error.status_code, "http_error", str(error.detail)
    elif isinstance(error, SafelightError):
        status, code, message = 500, "failed", str(error)
    else:
        log.error("request %s failed", getattr(request.state, "id", "?"), exc_info=error)
        status, code, message = 500, "internal_error", "Something went wrong; the log says what."
    if status >= 400:
        metrics.refused.labels(code).inc()
    response = error_body(request, status, code, message, field)
    response.headers.update(headers)
    return response


def error_body(request: Request, status: int, code: str, message: str, field: str) -> Response:
    """An error as the dialect of the path has it."""
    path = request.url.path
    if path.startswith("/v1/inference"):
        body: dict[str, Any] = deepinfra.error(message, field)
    elif path.startswith("/score"):
        body = azureml.error(message, field)
    elif path.startswith("/sdapi/"):
        body = a1111.error(status, code, message, field)
    else:
        body = openai.error(status, code, message, field)
    return JSONResponse(body, status)
