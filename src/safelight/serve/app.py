"""The HTTP application: the dialects, their errors, health and metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from safelight import __version__
from safelight.errors import InvalidRequest, ModelNotFound, SafelightError
from safelight.serve import scoring
from safelight.serve.dialects import a1111, a1111_lists, azureml, deepinfra, native, openai
from safelight.serve.house import House, Settings
from safelight.serve.jobs import Busy, Draining, Late
from safelight.serve.keys import Forbidden, Quota
from safelight.serve.outside import Outside
from safelight.serve.store import StoreError

log = logging.getLogger("safelight.serve")
_CODES = {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"}
_CODES |= {408: "too_slow", 413: "too_large"}


def create_app(settings: Settings | None = None, *, house: House | None = None) -> FastAPI:
    """The application.

    Args:
        house: instead of a new one of the settings.
    """
    house = house or House(settings or Settings())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if house.settings.azureml:  # no server of that kind without a checker
            await asyncio.to_thread(refuse_unchecked, house)
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
    app.state.house, app.state.metrics = house, house.metrics
    app.state.a1111, app.state.a1111_options = {}, {}
    app.state.doors = []  # paths with a sign-in of their own, which takes the same keys
    for dialect in (native, openai, deepinfra, a1111, a1111_lists):
        app.include_router(dialect.router)
    app.add_middleware(Outside, house=house, answer=_answer)  # type: ignore[arg-type]
    if house.settings.azureml:
        app.include_router(azureml.router)
    for kind in (SafelightError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer)

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        """The process lives, and so does every model's thread."""
        if not house.healthy:
            raise HTTPException(500, "a model's thread has ended")
        return {"status": "ok"}

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> Response:
        """The models of the start have been loaded, and requests are taken."""
        ready = house.ready
        told = {"ready": ready, "loaded": sorted(house.loaded()), "draining": house.draining}
        return JSONResponse(told, 200 if ready else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        """For Prometheus."""
        text = await asyncio.to_thread(house.metrics.text, house.loaded())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return app


def refuse_unchecked(house: House) -> None:
    """Load the model that ``/score`` answers with.

    Raises:
        InvalidRequest: it has no safety checker, and the settings do not say that it may.
    """
    model = house.worker(None).generator.model
    scoring.checked(model, without_checker=house.settings.without_checker)


def _start(house: House) -> None:
    """Load the models of the start, and take up again what a crash has left."""
    try:
        house.start()
    except Exception:
        log.exception("a model could not be loaded; the server is not ready")
    left = native.restore(house)
    if left:
        log.warning("%d jobs of before are taken up again", left)


async def _answer(request: Request, error: Exception) -> Response:
    """Every error in the form of the dialect that was spoken."""
    house: House = request.app.state.house
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
    elif isinstance(error, Forbidden):
        status, code, message, field = 403, "model_not_allowed", str(error), "model"
    elif isinstance(error, Busy):
        code = "quota_exceeded" if isinstance(error, Quota) else "queue_full"
        status, message = 429, str(error)
        headers = {"retry-after": f"{error.retry_after:.0f}", "x-should-retry": "true"}
    elif isinstance(error, Draining):
        status, code, message = 503, "shutting_down", str(error)
        headers = {"retry-after": "5", "x-should-retry": "true"}
    elif isinstance(error, Late):
        status, code, message = 504, "deadline_exceeded", str(error)
    elif isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
        code = _CODES.get(status, "http_error")
        headers |= error.headers or {}
    elif isinstance(error, StoreError):  # the disk is full, say: not taken, not lost
        status, code, message = 507, "not_stored", str(error)
    elif isinstance(error, SafelightError):
        status, code, message = 500, "failed", str(error)
    else:
        log.error("request %s failed", getattr(request.state, "id", "?"), exc_info=error)
        status, code, message = 500, "internal_error", "Something went wrong; the log says what."
    if status >= 400:
        house.metrics.refused.labels(code).inc()
        request.state.code = code
    response = error_body(request, status, code, _short(message), field)
    response.headers.update(headers)
    return response


def _short(message: str) -> str:
    """What was sent may be in it."""
    return message if len(message) <= 1000 else f"{message[:997]}..."


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
