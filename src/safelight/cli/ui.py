"""``safelight ui``: the web page."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli import show
from safelight.errors import InvalidRequest, MissingExtra
from safelight.names import DEFAULT_MODEL

if TYPE_CHECKING:
    from fastapi import FastAPI

    from safelight.serve.client import Client


def command(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "-m", "--model", help="What to offer; several times for several. [every shipped one]"
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option("--server", help="Use a server elsewhere (http://HOST:PORT) instead."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", "--listen-ip", help="Where to listen; 0.0.0.0 is everywhere.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", "--listen-port", min=1, max=65535, help="The port.")
    ] = 7860,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar="SAFELIGHT_API_KEY",
            help="Who may open the page; with --server: what that server asks for.",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16, bfloat16.")
    ] = None,
    safety_checker: Annotated[
        str | None, typer.Option("--safety-checker", help="A checker for every model.")
    ] = None,
    lora_dir: Annotated[
        list[str] | None, typer.Option("--lora-dir", help="Folder of LoRAs to choose from.")
    ] = None,
    embedding_dir: Annotated[
        list[str] | None,
        typer.Option("--embedding-dir", help="Folder of textual inversions to choose from."),
    ] = None,
) -> None:
    """Make pictures in the browser, at http://127.0.0.1:7860/ui; the interfaces of `safelight
    serve` are on the same port."""
    need()
    import uvicorn

    if any(not key.strip() for key in api_key or []):
        raise InvalidRequest("api-key", "is empty.")
    if server is not None:
        given = {"model": models, "device": device, "dtype": dtype, "lora-dir": lora_dir}
        given |= {"embedding-dir": embedding_dir, "safety-checker": safety_checker}
        for name, value in given.items():
            if value:
                raise InvalidRequest(name, "is for the server's own command.", "Leave it out here.")
        app = remote(server, (api_key or [None])[0])
        what = server
    else:
        from safelight.serve.app import create_app
        from safelight.serve.house import Settings

        settings = Settings(
            models=tuple(models or everything()),
            device=device,
            dtype=dtype,
            safety_checker=safety_checker,
            lora_dir=tuple(lora_dir or ()),
            embedding_dir=tuple(embedding_dir or ()),
            api_keys=tuple(api_key or ()),
        )
        app, what = with_page(create_app(settings)), ", ".join(settings.models)
    if host not in ("127.0.0.1", "localhost", "::1") and not (api_key and server is None):
        show.words().print(
            "Anyone who reaches this port may use it: no key is asked for.", style="yellow"
        )
    show.words().print(f"http://{host}:{port}/ui for {what}", markup=False)
    # Open pages hold a connection each; a stop does not wait for them.
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=3,
    )


def everything() -> list[str]:
    """The shipped models, the default first; each is loaded when it is first used."""
    from safelight import shipped

    return [DEFAULT_MODEL, *(name for name in shipped.names() if name != DEFAULT_MODEL)]


def need() -> None:
    """Raise what to install where gradio or the server's parts are missing; keep gradio quiet.

    Raises:
        MissingExtra
    """
    # Read by gradio when it is imported: no telemetry, no look for newer versions.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra("the web page", "ui") from error


def with_page(app: FastAPI) -> FastAPI:
    """The application of a server, with the page on it."""
    from safelight.serve.local import Local

    house = app.state.house

    def known(key: str) -> bool:
        return house.keys.find(f"Bearer {key}") is not None

    return _mounted(app, Local(house), known=known if house.keys.askers else None)


def remote(server: str, key: str | None) -> FastAPI:
    """An application that is the page alone, for a server elsewhere.

    Raises:
        Unreachable: nobody answers there.
    """
    from fastapi import FastAPI

    from safelight.serve.client import Remote

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    return _mounted(app, Remote(server, key), where=f"at {server}")


def _mounted(app: FastAPI, client: Client, **how: Any) -> FastAPI:
    from safelight.ui.desk import Desk
    from safelight.ui.mount import mount

    return mount(app, Desk(client), **how)
