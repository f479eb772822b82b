"""The options of the fast modes, shared by commands. No torch."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from safelight.errors import InvalidRequest

Fast = Annotated[
    int | None,
    typer.Option("--fast", help="A preset, 1 (nearly free) to 3 (strongest): docs/fast.md."),
]
Interval = Annotated[
    str | None,
    typer.Option("--guidance-interval", metavar="LOW,HIGH", help="Noise levels with guidance."),
]
Until = Annotated[
    float | None,
    typer.Option("--guidance-until", help="Share of the steps after which guidance is dropped."),
]
Freeze = Annotated[
    bool, typer.Option("--freeze-context", help="From there on the prompt is not read again.")
]
Cache = Annotated[
    int | None,
    typer.Option("--block-cache", help="Run the whole UNet once in so many calls (DeepCache)."),
]
Branch = Annotated[
    int | None,
    typer.Option("--block-cache-branch", help="How much runs at every call; 0 is least."),
]
Decoder = Annotated[
    str | None, typer.Option("--decoder", help="full, or tiny where the model has one.")
]


def fields(
    fast: int | None,
    interval: str | None,
    until: float | None,
    freeze: bool,
    cache: int | None,
    branch: int | None,
    decoder: str | None,
) -> dict[str, Any]:
    """What was given, as fields of a request."""
    given = {
        "fast": fast,
        "guidance_interval": None if interval is None else _levels(interval),
        "guidance_until": until,
        "freeze_context": freeze or None,
        "block_cache": cache,
        "block_cache_branch": branch,
        "decoder": decoder,
    }
    return {name: value for name, value in given.items() if value is not None}


def model_for(model: str, fast: int | None) -> str:
    """The model that makes the pictures: with ``--fast 3`` its student, where it has one."""
    if fast != 3:
        return model
    from safelight import shipped

    return shipped.student(model) or model


def _levels(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        problem = f"{text!r} are not two noise levels."
        raise InvalidRequest("guidance-interval", problem, "Write 0.3,3.") from None
    return low, high
