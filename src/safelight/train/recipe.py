"""Recipes: everything a training run is, as one TOML file.

``safelight train RECIPE --dry-run`` prints the resolved recipe. Lengths are counted in pictures,
so that a run means the same whatever its batch size; ``steps`` and ``optim.warmup_steps`` may be
written instead, as the cards do. A file with ``[[stages]]`` is several runs, each of which starts
from what the one before it made.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from safelight.errors import InvalidRequest
from safelight.spec import (
    PriorSpec,
    Record,
    TextSpec,
    TinyDecoderSpec,
    UNetSpec,
    VAESpec,
    VisionSpec,
)
from safelight.train.data_recipe import DataRecipe
from safelight.train.personal_recipe import PersonalRecipe
from safelight.train.sizes import UNETS


class OptimRecipe(Record):
    """AdamW (Loshchilov and Hutter 2019) with linear warm-up and a final decay."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """``adamw8bit`` keeps its moments in 8 bits, where ``bitsandbytes`` is installed."""
    batch: int = Field(default=64, gt=0)
    """Pictures at once on one process."""
    accumulation: int = Field(default=1, gt=0)
    """Batches that make a step."""
    processes: int = Field(default=1, gt=0)
    """Processes (accelerators) the recipe is written for. A step is always ``batch x accumulation
    x processes`` pictures: where there are fewer processes, each accumulates more."""
    lr: float = Field(default=1e-3, gt=0)
    warmup: int = Field(default=0, ge=0)
    """Pictures over which the rate rises linearly from zero."""
    decay: float = Field(default=0.4, ge=0, le=1)
    """Share of the run, at its end, over which the rate falls."""
    decay_shape: Literal["linear", "cosine"] = "linear"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    """Largest gradient norm."""

    @model_validator(mode="before")
    @classmethod
    def _warmup_in_pictures(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping) or "warmup_steps" not in fields:
            return fields
        fields = dict(fields)
        steps = fields.pop("warmup_steps")
        if "warmup" in fields:
            raise ValueError("warmup (pictures) and warmup_steps say the same thing: write one")
        return {**fields, "warmup": _pictures("warmup_steps", steps, fields)}

    @property
    def step(self) -> int:
        """Pictures an optimiser step sees: the global batch."""
        return self.batch * self.accumulation * self.processes

    def share(self, processes: int) -> tuple[int, int]:
        """How this many processes share a step: pictures at once, and batches, of each.

        Raises:
            InvalidRequest: they cannot share it evenly.
        """
        each, rest = divmod(self.step, processes)
        if rest == 0 and each <= self.batch:
            return each, 1
        if rest == 0 and each % self.batch == 0:
            return self.batch, each // self.batch
        raise InvalidRequest(
            "optim.batch",
            f"{processes} processes cannot share a step of {self.step} pictures in batches of "
            f"{self.batch}.",
            "Change optim.batch, or the number of processes.",
        )


class EMARecipe(Record):
    """Exponential moving average of the weights; what is saved and shipped."""

    decay: float = Field(default=0.999, ge=0, lt=1)
    """Classic: ``min(decay, (1 + n) / (10 + n))`` after ``n`` updates."""
    kind: Literal["classic", "power"] = "classic"
    width: float = Field(default=0.05, gt=0, lt=0.28)
    """Power-function: the profile's standard deviation as a share of the run."""


class CLIPRecipe(Record):
    """Contrastive training of a text and a vision tower."""

    text: TextSpec
    vision: VisionSpec
    tokenizer: Path | None = None
    """A published ``tokenizer`` folder, for captions of one's own; None: learned from them."""
    attribute_weight: float = 1.0
    """Weight of the auxiliary attribute loss on the embeddings; its head is thrown away."""
    patch_weight: float = 1.0
    """Weight of the auxiliary loss that names what each patch shows; likewise."""


class VAERecipe(Record):
    """Training of the KL autoencoder."""

    vae: VAESpec
    l1: float = 1.0
    mse: float = 4.0
    gradient: float = 1.0
    """Weight of the L1 distance between neighbouring-pixel differences."""
    kl: float = 1e-6
    """Weight of the divergence, in nats a picture."""
    edges: float = 3.0
    """Extra weight of pixels near edges, where shapes are decided."""
    freeze_encoder: bool = False
    """Train the decoder alone, on latents that stay as they are."""


class DecoderRecipe(Record):
    """Training of a tiny decoder to make what an autoencoder's own makes."""

    decoder: TinyDecoderSpec
    vae: Path
    """A folder with the autoencoder; it stays as it is."""
    l1: float = 1.0
    mse: float = 4.0
    gradient: float = 1.0
    edges: float = 2.0
    """These four as in :class:`VAERecipe`."""


class DistillRecipe(Record):
    """What a teacher adds to the training of a UNet."""

    teacher: Path
    """A model or a run's folder; its networks stay as they are."""
    kind: Literal["labels", "guidance", "consistency"] = "labels"
    """``labels``: the teacher's predictions as soft labels (Hinton et al. 2015). ``guidance``: its
    guided predictions, the scale told to the student (Meng et al. 2023). ``consistency``: the
    start of its guided path in one step (Luo et al. 2023)."""
    hard: float = Field(default=0.5, ge=0)
    """Weight of the plain loss."""
    soft: float = Field(default=0.5, ge=0)
    """Weight of the squared distance to the teacher's prediction."""
    match: float = Field(default=0.0, ge=0)
    """Weight of the similarity-based layer match."""
    guidance: tuple[float, float] = (1.0, 8.0)
    """Scales that are drawn, uniformly (``guidance`` and ``consistency``)."""
    grid: int = Field(default=50, gt=1)
    """Steps of the teacher's DDIM path (``consistency``)."""
    huber: float = Field(default=0.001, gt=0)
    """Where the consistency loss bends from squared to absolute."""


class DiffusionRecipe(Record):
    """Training of a UNet on frozen latents and frozen towers."""

    task: Literal["text", "variations", "unclip", "inpaint", "depth", "x4"] = "text"
    """What the UNet is told: a caption; a picture's embedding as its one token; a caption and a
    noised embedding; a caption and planes beside the latents (mask and masked picture, depth, a
    small picture)."""
    unet: Annotated[UNetSpec, BeforeValidator(lambda unet: _published(unet))]
    """A table, or the name of a published size (:data:`safelight.train.sizes.UNETS`)."""
    prediction_type: Literal["epsilon", "v", "x0"] = "epsilon"
    clip: Path
    """Folder with the frozen towers and the tokenizer."""
    vae: Path
    """Folder with the frozen autoencoder."""
    drop_caption: float = Field(default=0.1, ge=0, le=1)
    """Share of captions (variations: tokens) replaced by their unconditional twin, the empty
    caption (a zero token), for classifier-free guidance."""
    drop_vector: float = Field(default=0.25, ge=0, le=1)
    """Share of class vectors that are zeroed (unCLIP)."""
    drop_picture: float = Field(default=0.25, ge=0, le=1)
    """Share of masks that hide the whole picture (inpainting)."""
    levels: int = Field(default=350, ge=1, le=1000)
    """Levels of the small picture's noise, 0 to this, exclusive (x4)."""
    antialias: bool = True
    """Whether CLIP's small pictures are antialiased; the original variations' were not."""
    train: Literal["all", "cross_attention"] = "all"
    """Which of the UNet's weights; ``cross_attention`` is the first stage of the later image
    variations."""
    timestep_power: float = Field(default=1.0, gt=0)
    """1: timesteps are uniform, as in the cards; below 1 high noise is seen more often."""
    weighting: Literal["none", "min_snr"] = "none"
    min_snr_gamma: float = 5.0
    offset_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of a shift a channel, in the noise and in its target."""
    input_perturbation: float = Field(default=0.0, ge=0)
    """Standard deviation of further noise in the input, not in the target."""


class PriorRecipe(Record):
    """Training of the prior: a picture's CLIP embedding from its caption (x0-prediction)."""

    prior: PriorSpec
    clip: Path
    drop_caption: float = Field(default=0.1, ge=0, le=1)


class SiteRecipe(Record):
    """Where the run takes place, for the manifest's energy and emissions."""

    hardware: str = ""
    """A name of :data:`safelight.train.emissions.WATTS`; empty: the processor's cores."""
    provider: str = ""
    region: str = ""


def _pictures(name: str, steps: Any, optim: Any) -> int:
    """Pictures in a number of steps."""
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"{name} must be a whole number, not {steps!r}")
    try:
        step = optim if isinstance(optim, OptimRecipe) else OptimRecipe.model_validate(optim)
    except ValidationError:
        return steps or 1  # optim is refused by its own name, a moment later
    return steps * step.step


def _published(unet: Any) -> Any:
    if not isinstance(unet, str):
        return unet
    if unet not in UNETS:
        raise ValueError(f"no published size {unet!r}; there are {', '.join(sorted(UNETS))}")
    return UNETS[unet]


KINDS = ("clip", "vae", "decoder", "diffusion", "prior", "personal")


class Recipe(Record):
    """A training run. Exactly one of :data:`KINDS` says what is trained; ``distill`` may come
    beside ``diffusion``."""

    name: str
    output: Path
    images: int = Field(gt=0)
    """Length of the run, in pictures seen; or write ``steps``."""
    seed: int = 0
    start: Path | None = None
    """Weights to start from; optimiser state starts fresh."""
    save_every: int = 50_000
    """Pictures between checkpoints."""
    keep: int = Field(default=2, gt=0)
    """Checkpoints that stay on disk."""
    sample_every: int = 50_000
    """Pictures between sample grids."""
    threads: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in while they train; weights and optimiser stay in float32."""
    compile: bool = False
    """``torch.compile`` the networks: a minute at the start, then 1.2 times as fast on a CPU."""
    gradient_checkpointing: bool = False
    """Compute activations again on the way back: less memory, a third more time."""
    data: DataRecipe = DataRecipe()
    optim: OptimRecipe = OptimRecipe()
    ema: EMARecipe = EMARecipe()
    clip: CLIPRecipe | None = None
    vae: VAERecipe | None = None
    decoder: DecoderRecipe | None = None
    diffusion: DiffusionRecipe | None = None
    prior: PriorRecipe | None = None
    personal: PersonalRecipe | None = None
    distill: DistillRecipe | None = None
    site: SiteRecipe = SiteRecipe()

    @model_validator(mode="before")
    @classmethod
    def _length_in_pictures(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping) or "steps" not in fields:
            return fields
        fields = dict(fields)
        steps = fields.pop("steps")
        if "images" in fields:
            raise ValueError("images and steps say the same thing: write one")
        return {**fields, "images": _pictures("steps", steps, fields.get("optim", {}))}

    @model_validator(mode="before")
    @classmethod
    def _own_pictures(cls, fields: Any) -> Any:
        """The manifest of a personalisation names its pictures, not the still life."""
        personal = fields.get("personal") if isinstance(fields, Mapping) else None
        if not isinstance(personal, Mapping) or "data" in fields:
            return fields
        return {**fields, "data": {"source": str(personal.get("instance_data", ""))}}

    @model_validator(mode="after")
    def _compatible(self) -> Self:
        if self.distill is not None and self.diffusion is None:
            raise ValueError("distill needs a diffusion section: what the student is told")
        if self.distill is not None and self.distill.match and self.compile:
            raise ValueError("distill.match reads layers, which compile hides: leave one out")
        if self.data.buckets is not None:
            if self.diffusion is None or self.diffusion.task in ("depth", "x4"):
                what = "this recipe" if self.diffusion is None else self.diffusion.task
                raise ValueError(f"data.buckets: {what} trains on squares: leave them out")
            if self.compile:
                raise ValueError("data.buckets change shapes, which compile fixes: leave one out")
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return -(-self.images // self.optim.step)

    def share(self, processes: int) -> tuple[int, int]:
        """Pictures at once, and batches, of each of some processes (:meth:`OptimRecipe.share`).

        Raises:
            InvalidRequest: they cannot share a step evenly, or not in batches of one shape.
        """
        batch, batches = self.optim.share(processes)
        if self.data.buckets is not None and self.optim.batch % batch:
            raise InvalidRequest(
                "data.buckets",
                f"{processes} processes take {batch} pictures at once, which does not divide the "
                f"buckets' batch of {self.optim.batch}.",
                "Change optim.batch, or the number of processes.",
            )
        return batch, batches

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`."""
        kinds = [k for k in KINDS if getattr(self, k) is not None]
        if len(kinds) != 1:
            raise InvalidRequest(
                "recipe", f"names {kinds or 'nothing'} to train.", "Write exactly one section."
            )
        return kinds[0]


def read_stages(path: str | Path, **changes: Any) -> list[Recipe]:
    """Read a TOML recipe as the runs it is: one, or one for each of its ``[[stages]]``.

    A stage is a name and what is different in it. Its output lies in a folder of that name, and it
    starts from the stage before, where it names no other start.

    Args:
        changes: replace top-level fields.

    Raises:
        InvalidRequest: the file is missing, not TOML, or a field is unknown or wrong.
    """
    path = Path(path)
    try:
        fields = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise InvalidRequest("recipe", f"no file {path}.", "See recipes/.") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest("recipe", f"{path} is not TOML: {error}.") from error
    stages = fields.pop("stages", None)
    fields |= changes
    if stages is None:
        return [recipe_of(fields, path)]
    made: list[Recipe] = []
    for stage in stages:
        if "name" not in stage or "output" not in fields:
            raise InvalidRequest("stages.name", f"a stage has none (in {path}).")
        merged = merged_with(fields, stage)
        merged["name"] = f"{fields.get('name', path.stem)}-{stage['name']}"
        merged["output"] = Path(fields["output"]) / stage["name"]
        if made and "start" not in stage:
            merged["start"] = made[-1].output
        made.append(recipe_of(merged, path))
    return made


def read_recipe(path: str | Path, **changes: Any) -> Recipe:
    """Read a TOML recipe that is one run; arguments and errors as :func:`read_stages`."""
    stages = read_stages(path, **changes)
    if len(stages) != 1:
        names = ", ".join(stage.name for stage in stages)
        raise InvalidRequest("stages", f"{path} is several runs: {names}.", "Choose one.")
    return stages[0]


def recipe_of(fields: Mapping[str, Any], source: object) -> Recipe:
    """A recipe from its fields.

    Args:
        source: where they were written, for messages.

    Raises:
        InvalidRequest: one is unknown or wrong.
    """
    try:
        recipe = Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise InvalidRequest(field, f"{first['msg']} (in {source}).") from error
    _ = recipe.kind
    return recipe


def merged_with(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` with some of them replaced, table by table."""
    merged = dict(fields)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[key] = merged_with(old, value)
        else:
            merged[key] = value
    return merged
