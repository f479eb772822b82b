"""The ``[data]`` section of a recipe: which pictures a run reads, and in which shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from safelight.spec import Record


def _switch(section: Any) -> Any:
    """``true`` is a section with its defaults, ``false`` is none."""
    return {True: {}, False: None}[section] if isinstance(section, bool) else section


class BucketsRecipe(Record):
    """Aspect buckets: batches of one shape each, of about equally many pixels
    (:mod:`safelight.data.framing`)."""

    step: int = Field(default=64, ge=8, multiple_of=8)
    """Sides are multiples of this many pixels."""
    smallest: int | None = Field(default=None, gt=0)
    """Shortest side; None: half of ``data.size``."""
    largest: int | None = Field(default=None, gt=0)
    """Longest side; None: twice ``data.size``."""


class DataRecipe(Record):
    """Which pictures a run reads."""

    source: str = "stilllife"
    """``stilllife``, the procedural world; or where pictures with captions are: a folder, shards,
    Parquet (:func:`safelight.data.sources.open_source`)."""
    filter: str = ""
    """The folder in the source that holds what a filter of ``safelight data`` chose."""
    caption: str | None = None
    """Column or field of the captions; None finds it by its usual names."""
    captions: Literal["need", "optional"] = "need"
    """Whether a picture without one is skipped, or has the empty one."""
    exclude: Path | None = None
    """A file of keys to leave out, one a line, such as ``safelight data dedup`` writes."""
    min_side: int = Field(default=0, ge=0)
    """Smaller pictures are skipped, in pixels."""
    mirror: bool = False
    """Show half of a source's pictures mirrored; captions may say left and right."""
    hold_out: float = Field(default=0.01, ge=0, lt=1)
    """Share of a source's pictures that is not trained on but validated with."""
    split: Literal["train", "val", "combo", "pair", "all"] = "train"
    seed: int = 1
    size: int = Field(default=64, ge=8, multiple_of=8)
    count: int = Field(default=98304, gt=0)
    """Distinct renders; every one is also seen mirrored, with its caption's words exchanged."""
    cache: Path = Path("runs/renders")
    crop: int = Field(default=0, ge=0, multiple_of=8)
    """Side of random crops to train on, in pixels; 0: whole pictures."""
    buckets: Annotated[BucketsRecipe | None, BeforeValidator(lambda b: _switch(b))] = None
    """``true``, or a table: train a UNet on pictures of many shapes instead of squares."""

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        if self.buckets is None:
            return self
        if self.source == "stilllife":
            raise ValueError("buckets: the still life is square: leave them out")
        if self.crop:
            raise ValueError("buckets and crop: crops have one shape: leave one out")
        if self.size % self.buckets.step:
            raise ValueError(
                f"buckets.step: size {self.size} is no multiple of it ({self.buckets.step})"
            )
        return self
