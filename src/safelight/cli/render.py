"""The engine that generates, as training wants it: prompts and seeds to pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from safelight.model import Model


class Engine:
    """A :class:`~safelight.train.class_pictures.Render`.

    Args:
        tell: called with how many pictures were made so far.
    """

    def __init__(self, tell: Callable[[int], object] = lambda made: None) -> None:
        self.tell, self.made = tell, 0

    def __call__(
        self, model: Model, prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image | None]:
        """One picture a prompt; None for one that was withheld or could not be made."""
        from safelight.generate import Generator
        from safelight.request import Outcome

        made = Generator(model).generate(list(prompts), seed=list(seeds))
        self.made += len(made)
        self.tell(self.made)
        return [result.image if result.outcome == Outcome.ok else None for result in made]
