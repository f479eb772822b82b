"""``safelight serve``: the HTTP server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

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
    keys: Annotated[
        str | None,
        typer.Option(
            "--keys", envvar="SAFELIGHT_KEYS", help="TOML file of keys, priorities and quotas."
        ),
    ] = None,
    load: Annotated[
        str,
        typer.Option("--load", help="start: every model at the start; lazy: the first."),
    ] = "lazy",
    memory: Annotated[
        float | None,
        typer.Option("--memory", help="GiB beyond which idle models are unloaded."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure", help="Choose the size of network calls by measuring, once."
        ),
    ] = True,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16, bfloat16.")
    ] = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="About half the memory; a little slower.")
    ] = False,
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
    fast: Annotated[
        int | None,
        typer.Option("--fast", min=0, max=3, help="The preset of requests that name none."),
    ] = None,
    live: Annotated[
        int | None,
        typer.Option("--live", min=1, help="Most pictures that share the networks. [as measured]"),
    ] = None,
    patience: Annotated[
        float,
        typer.Option("--patience", min=1, help="Seconds after which a job is not overtaken."),
    ] = 60.0,
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
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log one JSON object a line.")
    ] = False,
    azureml: Annotated[
        bool,
        typer.Option("--azureml", help="Answer AzureML's /score too. Needs a safety checker."),
    ] = False,
    without_checker: Annotated[
        bool,
        typer.Option("--without-checker", help="With --azureml: pictures need not be checked."),
    ] = False,
    content_safety: Annotated[
        bool,
        typer.Option(
            "--content-safety",
            help="Ask Azure AI Content Safety about prompts and pictures "
            "(CONTENT_SAFETY_ENDPOINT, CONTENT_SAFETY_KEY, CONTENT_SAFETY_THRESHOLD).",
        ),
    ] = False,
    ui: Annotated[
        bool, typer.Option("--ui", help="The web page too, at /ui (extra `ui`).")
    ] = False,
) -> None:
    """Serve models over HTTP: jobs, OpenAI's Images API, DeepInfra's and AzureML's calls.

    The interfaces are described at /docs of the running server.
    """
    try:
        import uvicorn

        from safelight.serve import logs
        from safelight.serve.app import create_app, refuse_unchecked
        from safelight.serve.house import House, Settings
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("safelight"):
            raise
        raise MissingExtra("the server", "serve") from error
    if load not in ("lazy", "start"):
        raise InvalidRequest("load", f"{load!r} is unknown.", "lazy or start.")
    if memory is not None and not memory > 0:
        raise InvalidRequest("memory", f"must be above 0, not {memory:g}.")
    if host not in ("127.0.0.1", "localhost", "::1") and not (api_key or keys):
        show.words().print(
            "Anyone who reaches this port may use it: no --api-key was given.", style="yellow"
        )
    if any(not key.strip() for key in api_key or []):
        raise InvalidRequest("api-key", "is empty.")
    if without_checker and not azureml:
        raise InvalidRequest("without-checker", "has a meaning for /score alone.", "Add --azureml.")
    settings = Settings(
        models=tuple(models or (DEFAULT_MODEL,)),
        device=device,
        dtype=dtype,
        plan="low-memory" if low_memory else None,
        safety_checker=safety_checker,
        lora_dir=tuple(lora_dir or ()),
        embedding_dir=tuple(embedding_dir or ()),
        api_keys=tuple(api_key or ()),
        keys=keys,
        load="start" if load == "start" else "lazy",
        memory=memory,
        measure=measure,
        fast=fast,
        live=live,
        patience=patience,
        queue_seconds=queue_seconds,
        max_count=max_count,
        max_steps=max_steps,
        data_dir=data,
        drain_seconds=drain_seconds,
        azureml=azureml,
        without_checker=without_checker,
    )
    if ui:
        from safelight.cli import ui as page

        page.need()
    house = House(settings, loader=_moderated() if content_safety else None)
    if azureml:
        refuse_unchecked(house)
    if not log_json:
        told = f"http://{host}:{port} serves {', '.join(settings.models)}"
        show.words().print(told, markup=False)
    app = create_app(house=house)
    if ui:
        app = page.with_page(app)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_config=logs.config(as_json=log_json),
        access_log=False,
        # A client that does not read its answer, or an open page, must not hold up a stop.
        timeout_graceful_shutdown=int(drain_seconds) + 5,
    )


def _moderated() -> Callable[..., Any]:
    """What loads a model, with content safety as the environment says."""
    import functools

    from safelight.generate import load
    from safelight.safety import ONLINE
    from safelight.safety.azure import from_environment

    return functools.partial(load, moderation=from_environment(ONLINE))
