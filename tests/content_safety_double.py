"""Azure AI Content Safety's double on this machine: its REST interface, and a list of words."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

KEY = "a-key"
WORDS = {"fight": ("Violence", 4), "scratch": ("Violence", 2), "insult": ("Hate", 5)}


@dataclass
class Service:
    """What it was asked, and how it behaves."""

    url: str = ""
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    """Of every request, whatever its kind."""
    picture: dict[str, int] = field(default_factory=dict)
    """Severities of every picture."""
    fail: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """(status, headers) of the next answers."""
    garbled: bool = False

    @property
    def texts(self) -> list[str]:
        return [body["text"] for kind, body in self.asked if kind == "text"]

    @property
    def environment(self) -> dict[str, str]:
        return {"CONTENT_SAFETY_ENDPOINT": self.url, "CONTENT_SAFETY_KEY": KEY}


class _Handler(BaseHTTPRequestHandler):
    service: Service

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.service.keys.append(self.headers.get("Ocp-Apim-Subscription-Key"))
        self._answer(404, {})

    def do_POST(self) -> None:
        self.service.keys.append(self.headers.get("Ocp-Apim-Subscription-Key"))
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        path, _, query = self.path.partition("?")
        if self.service.fail:
            status, headers = self.service.fail.pop(0)
            return self._answer(status, {"error": {"code": "x", "message": str(body)}}, headers)
        if self.headers.get("Ocp-Apim-Subscription-Key") != KEY:
            return self._answer(401, {"error": {"code": "401", "message": "wrong key"}})
        if query != "api-version=2024-09-01":
            return self._answer(400, {"error": {"code": "InvalidApiVersion"}})
        found = dict.fromkeys(body["categories"], 0)
        if path == "/contentsafety/text:analyze":
            if not 0 < len(body["text"]) <= 10_000 or body["outputType"] != "EightSeverityLevels":
                return self._answer(400, {"error": {"code": "InvalidRequestBody"}})
            self.service.asked.append(("text", body))
            for word, (category, severity) in WORDS.items():
                if word in body["text"]:
                    found[category] = max(found[category], severity)
        elif path == "/contentsafety/image:analyze":
            size = Image.open(io.BytesIO(base64.b64decode(body["image"]["content"]))).size
            if min(size) < 50 or max(size) > 2048:
                return self._answer(400, {"error": {"code": "InvalidImageSize"}})
            self.service.asked.append(("image", {}))
            self.service.sizes.append(size)
            found |= self.service.picture
        else:
            return self._answer(404, {"error": {"code": "404"}})
        rows = [{"category": name, "severity": level} for name, level in found.items()]
        self._answer(200, {"categoriesAnalysis": rows[: 2 if self.service.garbled else 4]})

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def content_safety() -> Iterator[Service]:
    """The service on a free port of this machine."""
    service = Service()
    handler = type("Handler", (_Handler,), {"service": service})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    service.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
