"""Which objective trains what a recipe names."""

from __future__ import annotations

from typing import Any

from safelight.train.recipe import Recipe


def objective(recipe: Recipe, render: Any = None) -> Any:
    """The :class:`~safelight.train.loop.Objective` of a recipe's one section.

    Each kind is imported only when it is asked for.

    Args:
        render: a :class:`~safelight.train.class_pictures.Render`, for the kinds whose samples the
            engine that generates makes.
    """
    match recipe.kind:
        case "clip" if recipe.data.source != "stilllife":
            from safelight.train.pairs import PairsObjective

            return PairsObjective(recipe)
        case "clip":
            from safelight.train.contrastive import ContrastiveObjective

            return ContrastiveObjective(recipe)
        case "vae":
            from safelight.train.autoencoder import AutoencoderObjective

            return AutoencoderObjective(recipe)
        case "decoder":
            from safelight.train.tiny_decoder import TinyDecoderObjective

            return TinyDecoderObjective(recipe)
        case "diffusion":
            from safelight.train.latent import LatentDiffusionObjective

            return LatentDiffusionObjective(recipe)
        case "prior":
            from safelight.train.prior import PriorObjective

            return PriorObjective(recipe)
        case "personal":
            from safelight.train.personal import PersonalObjective

            return PersonalObjective(recipe, render)
        case kind:
            raise AssertionError(f"no objective for {kind}")  # a new kind belongs here
