"""The :class:`~safelight.serve.client.Client` of a house in this process."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from safelight import provenance
from safelight.errors import SafelightError
from safelight.serve import describe
from safelight.serve.client import Full
from safelight.serve.dialects import native
from safelight.serve.house import House
from safelight.serve.jobs import Busy


class Local:
    """Speaks to a house as :class:`~safelight.serve.client.Remote` speaks to a server."""

    def __init__(self, house: House) -> None:
        self.house = house

    def capabilities(self) -> Mapping[str, Any]:
        return describe.server(self.house)

    def model(self, name: str) -> Mapping[str, Any]:
        return describe.model(self.house, name, load=True)

    def submit(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return native.accept(self.house, body)
        except Busy as error:
            raise Full(str(error), error.retry_after) from error

    def job(self, name: str) -> Mapping[str, Any]:
        job = self.house.job(name)
        if job is None:
            raise SafelightError("the server has forgotten this job.")
        return native.told(self.house, job)

    def preview(self, name: str) -> bytes | None:
        job = self.house.job(name)
        if job is None or job.preview is None:
            return None
        out = io.BytesIO()
        job.preview.image.save(out, "PNG")
        return out.getvalue()

    def picture(self, name: str, index: int) -> bytes:
        job = self.house.job(name)
        for result in [] if job is None else job.results:
            if job is not None and result.index == index and result.image is not None:
                return provenance.encode(result, job.format)
        raise SafelightError(f"job {name} has no picture {index}.")

    def cancel(self, name: str) -> None:
        job = self.house.job(name)
        if job is not None:
            job.cancel()
