"""Speaking to a server: the same questions, asked over HTTP or, with :mod:`safelight.serve.local`,
in its own process.

Both answer with what ``/v1/jobs`` answers, so that whoever asks (the web page) is written once.
Errors are those of :mod:`safelight.errors` on either side.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any, Protocol

from safelight.errors import InvalidRequest, ModelNotFound, SafelightError

FINAL = ("completed", "failed", "cancelled")
"""States of a job after which nothing changes."""


class Unreachable(SafelightError):
    """The server does not answer, or not as Safelight."""


class Full(SafelightError):
    """The server's queue is full.

    Args:
        retry_after: seconds until there is likely to be room.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class Client(Protocol):
    """One server. Every method may be called from any thread, and may block."""

    def capabilities(self) -> Mapping[str, Any]:
        """``GET /v1/capabilities``: models, samplers, adapters, limits."""
        ...

    def model(self, name: str) -> Mapping[str, Any]:
        """One model, loaded for it."""
        ...

    def submit(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """``POST /v1/jobs``; pictures as base64. Returns the job.

        Raises:
            InvalidRequest, ModelNotFound, Full, SafelightError
        """
        ...

    def job(self, name: str) -> Mapping[str, Any]:
        """``GET /v1/jobs/ID``."""
        ...

    def preview(self, name: str) -> bytes | None:
        """What its last previewed picture looks like so far: a PNG file."""
        ...

    def picture(self, name: str, index: int) -> bytes:
        """A finished picture's file, with its settings."""
        ...

    def cancel(self, name: str) -> None:
        """Stop within one step."""
        ...


class Remote:
    """A server elsewhere, by its native interface.

    Args:
        url: ``http://host:port``.
        key: sent as ``Authorization: Bearer``.
        timeout: seconds for an answer; a first request may have to load a model.

    Raises:
        InvalidRequest: not an http address.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 300.0) -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise InvalidRequest("server", f"{url!r} is no address.", "Write http://HOST:PORT.")
        self.url, self._key, self._timeout = url.rstrip("/"), key, timeout

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        if method == "POST" and data is None:
            data = b"{}"
        request = urllib.request.Request(self.url + path, data=data, method=method)
        request.add_header("content-type", "application/json")
        if self._key:
            request.add_header("authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise _error(error) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise Unreachable(f"{self.url} does not answer: {reason}.") from None

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        answer = self._ask(method, path, body)
        try:
            return json.loads(answer)
        except ValueError:
            raise Unreachable(f"{self.url} does not answer as Safelight.") from None

    def capabilities(self) -> Mapping[str, Any]:
        return self._json("GET", "/v1/capabilities")

    def model(self, name: str) -> Mapping[str, Any]:
        found = self._json("GET", f"/v1/capabilities?model={urllib.parse.quote(name, safe='')}")
        return found["model"]

    def submit(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._json("POST", "/v1/jobs", body)

    def job(self, name: str) -> Mapping[str, Any]:
        return self._json("GET", f"/v1/jobs/{_id(name)}")

    def preview(self, name: str) -> bytes | None:
        try:
            return self._ask("GET", f"/v1/jobs/{_id(name)}/preview")
        except Missing:
            return None

    def picture(self, name: str, index: int) -> bytes:
        return self._ask("GET", f"/v1/jobs/{_id(name)}/images/{index}")

    def cancel(self, name: str) -> None:
        self._ask("POST", f"/v1/jobs/{_id(name)}/cancel")


class Missing(SafelightError):
    """The server has no such thing."""


def _id(name: str) -> str:
    return urllib.parse.quote(name, safe="")


def _error(error: urllib.error.HTTPError) -> SafelightError:
    """What the server's answer would have been in this process."""
    try:
        told = json.loads(error.read())["error"]
        message, field = str(told["message"]), told.get("param") or ""
        code = told.get("code") or ""
    except (ValueError, KeyError, TypeError, AttributeError):
        return Unreachable(f"the server answers {error.code} and says no more.")
    if error.code == 429:
        return Full(message, float(error.headers.get("retry-after") or 1))
    if code == "model_not_found":
        return ModelNotFound(message)
    if error.code == 404:
        return Missing(message)
    if field:
        return InvalidRequest(field, message.removeprefix(f"{field}: "))
    return SafelightError(message)
