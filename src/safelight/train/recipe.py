"""Recipes: everything a training run is, as one TOML file.

``safelight train RECIPE --dry-run`` prints the resolved recipe. Lengths are counted in pictures,
so that a run means the same whatever its batch size.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from safelight.errors import InvalidRequest
from safelight.spec import Record, TextSpec, UNetSpec, VAESpec, VisionSpec


class DataRecipe(Record):
    """Which pictures a run reads."""

    world: Literal["stilllife"] = "stilllife"
    split: Literal["train", "val", "combo", "pair", "all"] = "train"
    seed: int = 1
    size: int = Field(default=64, ge=8, multiple_of=8)
    count: int = Field(default=98304, gt=0)
    """Distinct renders; every one is also seen mirrored, with its caption's words exchanged."""
    cache: Path = Path("runs/renders")


class OptimRecipe(Record):
    """AdamW (Loshchilov and Hutter 2019) with linear warm-up and a final decay."""

    batch: int = Field(default=64, gt=0)
    accumulation: int = Field(default=1, gt=0)
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


class EMARecipe(Record):
    """Exponential moving average of the weights; what is saved and shipped."""

    decay: float = Field(default=0.999, ge=0, lt=1)
    """Classic: ``min(decay, (1 + n) / (10 + n))`` after ``n`` updates."""


class CLIPRecipe(Record):
    """Contrastive training of a text and a vision tower."""

    text: TextSpec
    vision: VisionSpec
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


class DiffusionRecipe(Record):
    """Training of a UNet on frozen latents and a frozen text tower."""

    unet: UNetSpec
    prediction_type: Literal["epsilon", "v", "x0"] = "epsilon"
    clip: Path
    """Folder with the frozen towers and the tokenizer."""
    vae: Path
    """Folder with the frozen autoencoder."""
    drop_caption: float = Field(default=0.1, ge=0, le=1)
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    timestep_power: float = Field(default=1.0, gt=0)
    """1: timesteps are uniform, as in the cards; below 1 high noise is seen more often."""
    weighting: Literal["none", "min_snr"] = "none"
    min_snr_gamma: float = 5.0
    offset_noise: float = 0.0
    input_perturbation: float = 0.0


class Recipe(Record):
    """A training run. Exactly one of ``clip``, ``vae`` and ``diffusion`` says what is trained."""

    name: str
    output: Path
    images: int = Field(gt=0)
    """Length of the run, in pictures seen."""
    seed: int = 0
    start: Path | None = None
    """Weights to start from; optimiser state starts fresh."""
    save_every: int = 50_000
    """Pictures between checkpoints."""
    sample_every: int = 50_000
    """Pictures between sample grids."""
    threads: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in while they train; weights and optimiser stay in float32."""
    compile: bool = False
    """``torch.compile`` the networks: a minute at the start, then 1.2 times as fast on a CPU."""
    data: DataRecipe = DataRecipe()
    optim: OptimRecipe = OptimRecipe()
    ema: EMARecipe = EMARecipe()
    clip: CLIPRecipe | None = None
    vae: VAERecipe | None = None
    diffusion: DiffusionRecipe | None = None

    @property
    def kind(self) -> str:
        """``clip``, ``vae`` or ``diffusion``."""
        kinds = [k for k in ("clip", "vae", "diffusion") if getattr(self, k) is not None]
        if len(kinds) != 1:
            raise InvalidRequest(
                "recipe", f"names {kinds or 'nothing'} to train.", "Write exactly one section."
            )
        return kinds[0]


def read_recipe(path: str | Path, **changes: Any) -> Recipe:
    """Read a TOML recipe; ``changes`` replace top-level fields.

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
    try:
        recipe = Recipe.model_validate({**fields, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(field, f"{first['msg']} (in {path}).") from error
    _ = recipe.kind
    return recipe
