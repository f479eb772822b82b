"""Options that say how to read an original single file, shared by commands. No torch."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Predicts(StrEnum):
    """What a UNet predicts."""

    epsilon = "epsilon"
    v = "v"


Ema = Annotated[
    bool | None,
    typer.Option("--ema/--no-ema", help="Of a single file: averaged weights, or the last ones."),
]
Prediction = Annotated[
    Predicts | None,
    typer.Option("--prediction-type", help="Of a single file, where it cannot say (v2)."),
]
Family = Annotated[
    str | None, typer.Option("--family", help="Of a single file, instead of what it looks like.")
]
Layers = Annotated[
    int | None,
    typer.Option("--layers", min=1, max=8, help="Of a single file: residual layers a level."),
]
TokenizerPlace = Annotated[
    Path | None, typer.Option("--tokenizer", help="For a single file, which holds none: a folder.")
]
ClipStats = Annotated[
    Path | None,
    typer.Option("--clip-stats", help="For unCLIP on CLIP L: ViT-L-14_stats.th."),
]


def given(
    ema: bool | None,
    prediction_type: Predicts | None,
    family: str | None,
    layers: int | None,
    tokenizer: Path | None,
    clip_stats: Path | None,
) -> dict[str, Any]:
    """Those that were given, for :meth:`safelight.model.Model.load`."""
    options = {
        "ema": ema,
        "prediction_type": None if prediction_type is None else prediction_type.value,
        "family": family,
        "layers": layers,
        "tokenizer": tokenizer,
        "clip_stats": clip_stats,
    }
    return {name: value for name, value in options.items() if value is not None}
