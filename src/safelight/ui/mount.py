"""The page on a server's own port, at ``/ui``: what it may load, and who may open it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safelight.ui import layout
from safelight.ui.desk import Desk
from safelight.ui.page import Page

PATH = "/ui"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; media-src 'self' blob: data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""A Content-Security-Policy: the browser itself refuses whatever is not of this server. Gradio
needs the inline scripts."""
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><g fill="#c8352b">'
    '<path d="M9 4h14l5 15H4z"/><circle cx="16" cy="24" r="5"/></g></svg>'
)


def mount(
    app: FastAPI,
    desk: Desk,
    *,
    known: Callable[[str], bool] | None = None,
    where: str = "on this machine",
) -> FastAPI:
    """Put the page on an application, and lead its root there.

    Args:
        known: whether a key opens it: a sign-in asks for one as the password. None: no sign-in.
        where: what the page's head says of the server.
    """

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse(PATH + "/")

    @app.get("/favicon.ico", include_in_schema=False)
    @app.get(f"{PATH}/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(ICON, media_type="image/svg+xml")

    if known is not None:
        app.state.doors += [PATH, "/", "/favicon.ico"]
    built = Page(desk, where).build()
    built.queue(default_concurrency_limit=None, api_open=False)
    app.state.desk = desk
    app.add_middleware(Quiet)
    mounted: Any = gr.mount_gradio_app(
        app,
        built,
        path=PATH,
        auth=None if known is None else lambda _, password: known(password.strip()),
        auth_message="Any name will do; the password is an API key of this server.",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        ssr_mode=False,
        show_error=True,
        max_file_size="64mb",
        theme=layout.theme(),
        css=layout.CSS.read_text(encoding="utf-8"),
        head=layout.HEAD,
    )
    return mounted


class Quiet:
    """Keeps the page's parts from asking other machines for anything.

    Adds :data:`POLICY` to what lies under :data:`PATH`, and takes the tags that the policy would
    block out of its HTML.
    """

    _FOREIGN = re.compile(
        rb'<(?:link|meta)\b[^>]*?(?:href|content)="https?://[^"]*"[^>]*>'
        rb'|<script\b[^>]*?src="https?://[^"]*"[^>]*>\s*</script>',
        re.DOTALL,
    )

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PATH):
            await self._app(scope, receive, send)
            return
        html: list[bytes] = []
        began: list[Message] = []

        async def filtered(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                headers.append((b"referrer-policy", b"no-referrer"))
                message = {**message, "headers": headers}
                kind = dict(message["headers"]).get(b"content-type", b"")
                if kind.startswith(b"text/html"):
                    began.append(message)
                    return
            elif began:
                html.append(message.get("body", b""))
                if message.get("more_body"):
                    return
                body = self._FOREIGN.sub(b"", b"".join(html))
                start = began[0]
                headers = [(k, v) for k, v in start["headers"] if k != b"content-length"]
                headers.append((b"content-length", str(len(body)).encode()))
                await send({**start, "headers": headers})
                message = {**message, "body": body}
            await send(message)

        # Compressed HTML could not be read.
        plain = [(k, v) for k, v in scope["headers"] if k != b"accept-encoding"]
        await self._app({**scope, "headers": plain}, receive, filtered)
