"""The section of a recipe that personalises a model. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from safelight.spec import Record


class PersonalRecipe(Record):
    """A few pictures of one subject, taught to a model that knows the rest."""

    method: Literal["dreambooth", "lora", "textual_inversion"] = "dreambooth"
    """``dreambooth``: the UNet's own weights (Ruiz et al. 2023). ``lora``: low-rank additions to
    them (Hu et al. 2021). ``textual_inversion``: one new word (Gal et al. 2022)."""
    model: str = "tiny"
    """What to start from: a shipped name, a folder, a file or a hub id."""
    instance_data: Path
    """Folder with the subject's pictures, 5 to 10 of them."""
    instance_prompt: str = ""
    """What they show, with a rare word for the subject: ``a photo of sks dog``. Textual inversion
    needs none: its templates hold the new word."""
    class_data: Path | None = None
    """Folder with pictures of the subject's class; filled up to ``num_class_images`` by the model
    itself. None: ``class-pictures`` in the run's folder."""
    class_prompt: str = ""
    """``a photo of a dog``: with it, what the model knows of the class is preserved (prior
    preservation). Empty: it is not. ``a red cone | a blue cone``: several, in turns; each of the
    pictures that are made has its own prompt beside it, in a text file."""
    num_class_images: int = Field(default=100, gt=0)
    prior_loss_weight: float = Field(default=1.0, ge=0)
    train_text_encoder: bool = False
    """The text tower too (not for textual inversion, which trains a word of it only)."""
    rank: int = Field(default=4, gt=0)
    """Of the low-rank additions (``lora``)."""
    alpha: float | None = Field(default=None, gt=0)
    """Additions count ``alpha / rank`` times; None: once."""
    targets: tuple[Literal["attention", "feed_forward", "convolutions"], ...] = ("attention",)
    """Which layers get additions; in the text tower, ``convolutions`` says nothing."""
    token: str = ""
    """The new word (textual inversion): ``<curio>``."""
    initializer: str = ""
    """A known word, one token long, whose meaning the new one starts with."""
    vectors: int = Field(default=1, gt=0, le=75)
    """How many vectors stand for the new word."""
    learnable: Literal["object", "style"] = "object"
    """What the new word is, for the sentences that it is learned in."""
    templates: tuple[str, ...] = ()
    """Other such sentences, each with ``{}`` for the word."""
    resolution: int | None = Field(default=None, gt=0)
    """Side of the training pictures in pixels; None: the model's own."""
    crop: Literal["center", "random"] = "random"
    """Where squares are cut from pictures that are none."""
    flip: bool = False
    """Half of the pictures mirrored. Not for subjects with a left and a right."""
    weighting: Literal["none", "min_snr"] = "none"
    """Of the subject's loss; that of the class stays plain, as in the reference."""
    min_snr_gamma: float = Field(default=5.0, gt=0)
    offset_noise: float = Field(default=0.0, ge=0)
    validation_prompts: tuple[str, ...] = ()
    """Held-out prompts of the sample sheets. Empty: the prompt that is trained on."""
    validation_images: int = Field(default=4, gt=0)
    """Pictures a prompt, at the same seeds each time."""
    clip: Path | None = None
    """A CLIP for the copying alarm; None: the model's own vision tower, or its safety checker's.
    Where there is none, pixels alone are compared."""
    half: bool = False
    """Write the model in float16 (``dreambooth``)."""

    @property
    def class_prompts(self) -> tuple[str, ...]:
        """``class_prompt``'s parts."""
        return tuple(part.strip() for part in self.class_prompt.split("|") if part.strip())

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.method == "textual_inversion":
            if not self.token.strip() or not self.initializer.strip():
                raise ValueError("textual inversion needs token and initializer")
            if self.class_prompt or self.train_text_encoder:
                raise ValueError(
                    "textual inversion trains one word: class_prompt and train_text_encoder "
                    "belong to the other methods"
                )
            if any("{}" not in template for template in self.templates):
                raise ValueError("every one of templates needs {} where the word goes")
        elif not self.instance_prompt.strip():
            raise ValueError(f"{self.method} needs instance_prompt: what the pictures show")
        if self.class_data is not None and not self.class_prompt.strip():
            raise ValueError("class_data needs class_prompt: what those pictures show")
        if self.method == "lora" and not self.targets:
            raise ValueError("lora needs at least one of targets")
        return self
