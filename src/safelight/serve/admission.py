"""Whether a request may come in: who asks, and what a server takes at most."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from pydantic import Field

from safelight.errors import InvalidRequest
from safelight.request import GenerateRequest
from safelight.serve.keys import Asker
from safelight.spec import Record


@dataclass(frozen=True)
class Visit:
    """One HTTP request, as far as what is behind the dialects needs to know.

    Args:
        id: of the request.
        asker: whose key it came with; None where there are none.
    """

    id: str = ""
    asker: Asker | None = None


_VISIT: ContextVar[Visit] = ContextVar("visit", default=Visit())  # noqa: B039 (it is frozen)


def visit() -> Visit:
    """The HTTP request that this is part of. Threads that were asked to help know it too."""
    return _VISIT.get()


@contextmanager
def visiting(who: Visit) -> Iterator[None]:
    """Everything in this block is part of a request."""
    token = _VISIT.set(who)
    try:
        yield
    finally:
        _VISIT.reset(token)


class Limits(Record):
    """What one request may ask for."""

    max_pixels: int = Field(default=2048 * 2048, ge=64)
    max_steps: int = Field(default=512, ge=1)
    max_count: int = Field(default=10, ge=1)
    max_prompt: int = Field(default=10_000, ge=1)
    """Characters."""


def within(limits: Limits, request: GenerateRequest) -> None:
    """Raises:
    InvalidRequest: more than is taken, naming the field.
    """
    for name in ("prompt", "negative_prompt"):
        if len(getattr(request, name)) > limits.max_prompt:
            raise InvalidRequest(name, f"is over {limits.max_prompt:,} characters.")
    for name in ("steps", "count"):
        value, most = getattr(request, name) or 0, getattr(limits, f"max_{name}")
        if value > most:
            raise InvalidRequest(name, f"{value} is over this server's {most}.")
    if (request.width or 0) * (request.height or 0) > limits.max_pixels:
        problem = f"{request.width}x{request.height} is over this server's {limits.max_pixels:,}"
        raise InvalidRequest("width", f"{problem} pixels.")
