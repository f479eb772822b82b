"""The server's log: a line an event, as text or as JSON. Prompts and keys are in none of them."""

from __future__ import annotations

import json
import logging
import time
from typing import Any


def event(log: logging.Logger, message: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log ``message`` with named values. The caller sees to it that none is a prompt or a key."""
    log.log(level, message, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message`` and the event's
    fields; ``error`` holds a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told: dict[str, Any] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


class Plain(logging.Formatter):
    """For people: the same, fields as ``name=value``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        told = "".join(f" {k}={v}" for k, v in fields.items() if v is not None)
        return super().formatMessage(record) + told


def config(*, as_json: bool, level: str = "INFO") -> dict[str, Any]:
    """For :func:`logging.config.dictConfig`: our log and the HTTP server's, to stderr."""
    kind = "safelight.serve.logs.JsonLines" if as_json else "safelight.serve.logs.Plain"
    logger = {"handlers": ["stderr"], "level": level, "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"ours": {"()": kind}},
        "handlers": {
            "stderr": {"class": "logging.StreamHandler", "formatter": "ours"},
        },
        "loggers": dict.fromkeys(("safelight", "uvicorn", "uvicorn.error"), logger),
    }
