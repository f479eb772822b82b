"""``safelight serve``: the HTTP server."""

from __future__ import annotations

from typing import Annotated

import typer

from safelight.cli import show
from safelight.errors import InvalidRequest, MissingExtra
from safelight.names import DEFAULT_MODEL


def command(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "-m", "--model", help=f"What to serve; several times for several. [{DEFAULT_MODEL}]"
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", "--listen-ip", help="Where to listen; 0.0.0.0 is everywhere.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", "--listen-port", min=0, max=65535, help="The port.")
    ] = 7860,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", envvar="SAFELIGHT_API_KEY", help="Who may ask; several times."),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16, bfloat16.")
    ] = None,
    safety_checker: Annotated[
        str | None, typer.Option("--safety-checker", help="A checker for every model.")
    ] = None,
    lora_dir: Annotated[
        list[str] | None, typer.Option("--lora-dir", help="Folder of LoRAs that may be named.")
    ] = None,
    embedding_dir: Annotated[
        list[str] | None,
        typer.Option("--embedding-dir", help="Folder of textual inversions that may be named."),
    ] = None,
    live: Annotated[
        int, typer.Option("--live", min=1, help="Most pictures that share the networks.")
    ] = 8,
    queue_seconds: Annotated[
        float, typer.Option("--queue-seconds", min=1, help="Work that may wait, in seconds.")
    ] = 600.0,
    max_count: Annotated[
        int, typer.Option("--max-count", min=1, help="Pictures of a request.")
    ] = 10,
    max_steps: Annotated[int, typer.Option("--max-steps", min=1, help="Steps of a picture.")] = 512,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Folder where jobs are kept; they outlive a restart."),
    ] = None,
    drain_seconds: Annotated[
        float,
        typer.Option("--drain-seconds", min=0, help="How long accepted work may end at a stop."),
    ] = 60.0,
    ui: Annotated[
        bool, typer.Option("--ui", help="The web page too, at /ui (extra `ui`).")
    ] = False,
) -> None:
    """Serve models over HTTP: jobs, OpenAI's Images API, DeepInfra's and AzureML's calls.

    The interfaces are described at /docs of the running server.
    """
    try:
        import uvicorn

        from safelight.serve.app import create_app
        from safelight.serve.house import Settings
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("safelight"):
            raise
        raise MissingExtra("the server", "serve") from error
    if host not in ("127.0.0.1", "localhost", "::1") and not api_key:
        show.words().print(
            "Anyone who reaches this port may use it: no --api-key was given.", style="yellow"
        )
    if any(not key.strip() for key in api_key or []):
        raise InvalidRequest("api-key", "is empty.")
    settings = Settings(
        models=tuple(models or (DEFAULT_MODEL,)),
        device=device,
        dtype=dtype,
        safety_checker=safety_checker,
        lora_dir=tuple(lora_dir or ()),
        embedding_dir=tuple(embedding_dir or ()),
        api_keys=tuple(api_key or ()),
        live=live,
        queue_seconds=queue_seconds,
        max_count=max_count,
        max_steps=max_steps,
        data_dir=data,
        drain_seconds=drain_seconds,
    )
    show.words().print(f"http://{host}:{port} serves {', '.join(settings.models)}", markup=False)
    app = create_app(settings)
    if ui:
        from safelight.cli import ui as page

        page.need()
        app = page.with_page(app)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="info",
        access_log=False,
        # Open pages hold a connection each, which must not hold up a stop.
        timeout_graceful_shutdown=max(1, round(drain_seconds)) if ui else None,
    )
