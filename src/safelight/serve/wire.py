"""Pictures on the wire, and waiting for a job without blocking the server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from PIL import Image

from safelight import inputs, provenance
from safelight.errors import InvalidRequest
from safelight.fields import shown
from safelight.request import ImageResult
from safelight.serve.jobs import Job

FORMATS = {"png": "PNG", "jpeg": "JPEG", "jpg": "JPEG", "webp": "WEBP"}
TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


def picture(value: Any, field: str) -> bytes:
    """A picture's bytes from an upload, base64 or a data URL. Never a path: a request comes from
    outside, and a string in it opens no file here.

    Raises:
        InvalidRequest: nothing of these.
    """
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequest(field, "must be a picture: base64, a data URL or an upload.")
    if re.match(r"https?://", value, re.IGNORECASE):
        raise InvalidRequest(field, "is an address; this server fetches none.", "Send the picture.")
    try:
        return inputs.decoded(value)
    except ValueError as error:
        raise InvalidRequest(field, str(error), "Send base64, or a data URL.") from None


def format_of(name: Any, field: str = "output_format") -> str:
    """PIL's name of a format.

    Raises:
        InvalidRequest: an unknown one.
    """
    found = FORMATS.get(str("png" if name in (None, "") else name).lower())
    if found is None:
        raise InvalidRequest(field, f"{shown(name)} is unknown.", "png, jpeg or webp.")
    return found


def encoded(result: ImageResult, format: str = "PNG", quality: int | None = None) -> str:
    """A finished picture as base64, marked and with its settings."""
    return base64_of(provenance.encode(result, format, quality=quality))


def base64_of(data: bytes) -> str:
    """Bytes as text."""
    return base64.b64encode(data).decode()


def png(image: Image.Image) -> str:
    """A picture that is nobody's result, as base64."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return base64_of(out.getvalue())


async def finished(job: Job, receive: Callable[[], Awaitable[Any]] | None = None) -> Job:
    """Wait for a job's end.

    Args:
        receive: of the request, whose body has been read: what comes then is that the client has
            left, and the job is cancelled at once.
    """
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def hear(changed: Job) -> None:
        if changed.status.final:
            loop.call_soon_threadsafe(done.set)

    async def left() -> None:
        while receive is not None:
            if (await receive())["type"] == "http.disconnect":
                job.cancel()
                return

    stop, watching = job.listen(hear), asyncio.create_task(left())
    try:
        if not job.status.final:
            await done.wait()
    except asyncio.CancelledError:
        job.cancel()
        raise
    finally:
        stop()
        watching.cancel()
    return job


async def changes(job: Job, every: float = 0.1) -> AsyncIterator[Job]:
    """Yield the job after changes, at most every so many seconds, and at its end."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def hear(_: Job) -> None:
        loop.call_soon_threadsafe(changed.set)

    stop = job.listen(hear)
    try:
        while not job.status.final:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), 15)
            changed.clear()
            yield job
            if not job.status.final:
                await asyncio.sleep(every)
        yield job
    finally:
        stop()
