"""Interfaces that clients already speak. Each file reads one into
:class:`~safelight.request.GenerateRequest` and writes results back; none computes anything."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request

from safelight.errors import InvalidRequest, SafelightError
from safelight.request import GenerateRequest, ImageResult, Outcome
from safelight.serve import wire
from safelight.serve.house import House
from safelight.serve.jobs import Job, Status


def house_of(request: Request) -> House:
    """The server's models and jobs."""
    return request.app.state.house


async def json_body(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        raise InvalidRequest("body", "is not JSON.") from None
    if not isinstance(body, dict):
        raise InvalidRequest("body", "is not a JSON object.")
    return body


async def submitted(
    request: Request, requests: Sequence[GenerateRequest], model: str | None = None, **how: Any
) -> Job:
    """Queue requests; arguments and errors as :meth:`House.submit`."""
    return await asyncio.to_thread(house_of(request).submit, requests, model, **how)


async def waited(request: Request, job: Job, *, keep: bool = False) -> list[ImageResult]:
    """The pictures of a job, when it is done; it is cancelled when the client leaves.

    Args:
        keep: remember it afterwards: its pictures will be asked for by address.

    Raises:
        what the job failed with, or that a picture could not be made.
    """
    try:
        await wire.finished(job, request.receive)
    finally:
        if not keep:
            house_of(request).forget(job.id)
    if job.error is not None:
        raise job.error
    if job.status is Status.cancelled:
        raise SafelightError("the job was cancelled.")
    return job.pictures


def shown(results: list[ImageResult]) -> list[ImageResult]:
    """The same, where every one has a picture.

    Raises:
        SafelightError: one has none, for a reason that asking again will not change.
    """
    for result in results:
        if result.image is None and result.outcome is not Outcome.rejected:
            raise SafelightError(f"{result.outcome}: {result.message}")
    return results


def unknown(fields: Mapping[str, Any], known: set[str]) -> None:
    """Refuse what is not understood, by name.

    Raises:
        InvalidRequest: for the first such field.
    """
    for name in fields:
        if name not in known:
            raise InvalidRequest(name, "is not understood.", f"Known: {', '.join(sorted(known))}.")
