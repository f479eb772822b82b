"""Pictures of a subject's class, made by the model that is about to learn the subject
(Ruiz et al. 2023, 2208.12242, section 3.3)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from safelight.data.sources import ENDINGS
from safelight.errors import InvalidRequest
from safelight.model import Model
from safelight.store.pictures import save
from safelight.train.personal_recipe import PersonalRecipe

log = logging.getLogger(__name__)

_AT_ONCE = 8  # pictures that are asked for together


class Render(Protocol):
    """The engine that generates, as a function."""

    def __call__(
        self, model: Model, prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image | None]:
        """One picture a prompt, at the model's own settings; None for one that was withheld."""
        ...


def fill(folder: Path, settings: PersonalRecipe, model: Model, render: Render | None) -> None:
    """Make what a folder lacks of ``settings.num_class_images`` pictures.

    Their names are their seeds, so that an interrupted start goes on where it was. Where several
    class prompts take turns, each picture has its own beside it, in a text file.

    Args:
        render: None makes nothing.

    Raises:
        InvalidRequest: pictures are missing and there is nothing to make them, or nearly all that
            it makes are withheld.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = [p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS]
    seeds = [int(p.stem) for p in there if p.stem.isdecimal()]
    wanted, known = settings.num_class_images, settings.class_prompts
    missing, seed, withheld = wanted - len(there), max(seeds, default=-1) + 1, 0
    if missing > 0 and render is None:
        raise InvalidRequest(
            "class_data", f"{folder} has {len(there)} of {wanted} pictures.",
            "safelight personalize makes the others.",
        )  # fmt: skip
    while missing > 0 and render is not None:
        asked = range(seed, seed + min(missing, _AT_ONCE))
        prompts = [known[k % len(known)] for k in asked]
        made = render(model, prompts, asked)
        for number, prompt, picture in zip(asked, prompts, made, strict=True):
            if picture is None:
                withheld += 1
                continue
            file = folder / f"{number:06d}.png"
            if len(known) > 1:  # before the picture, which is what counts
                file.with_suffix(".txt").write_text(prompt + "\n", encoding="utf-8")
            save(file, picture)
            missing -= 1
        seed = asked.stop
        if withheld > 10 * wanted:
            raise InvalidRequest("class_prompt", "nearly all of its pictures are withheld.")
        log.info("class pictures: %d of %d are missing", max(missing, 0), wanted)
