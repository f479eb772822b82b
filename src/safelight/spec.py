"""Frozen descriptions of every part of a model: what the networks are, not how they run.

No torch here. A spec can be printed, hashed, compared and derived from another by
:meth:`Record.replace`. The published ``config.json`` spellings are translated to these
fields, and back, in :mod:`safelight.store`.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator


class Record(BaseModel):
    """A frozen record: unknown fields are errors, changes go through :meth:`replace`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def replace(self, **changes: Any) -> Self:
        """A copy with ``changes``, validated again (``model_copy`` would not)."""
        return type(self).model_validate({**dict(self), **changes})


class UNetSpec(Record):
    """The conditional UNet of the family (published as ``UNet2DConditionModel``).

    One entry of every tuple per resolution level, finest first.
    """

    sample_size: int = 64
    """Native height and width in latent cells."""
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """``block_out_channels``."""
    attention: tuple[bool, ...] = (True, True, True, False)
    """Which levels have transformer blocks."""
    heads: tuple[int, ...] = (8, 8, 8, 8)
    """Number of attention heads a level. The published key for it is the misnamed
    ``attention_head_dim``."""
    layers_per_block: int = 2
    """Residual layers a level on the way down; one more on the way up."""
    context_width: int = 768
    """Width of the text (or image) tokens: ``cross_attention_dim``."""
    linear_projection: bool = False
    """Linear (v2) instead of 1x1 convolution (v1) around transformer blocks."""
    only_cross_attention: tuple[bool, ...] = (False, False, False, False)
    """Levels whose first attention reads the context too (x4 upscaler)."""
    upcast_attention: bool = False
    """Attention scores in float32 whatever the network's dtype (SD 2.1)."""
    class_embedding: Literal["none", "table", "projection"] = "none"
    """``table``: an integer label (x4 upscaler); ``projection``: a float vector (unCLIP)."""
    class_embedding_size: int = 0
    """Rows of the table, or width of the vector."""
    guidance_embedding_size: int = 0
    """Width of the guidance-scale embedding of distilled students (``time_cond_proj_dim``)."""
    norm_groups: int = 32
    norm_eps: float = 1e-5

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        levels = len(self.channels)
        for name in ("attention", "heads", "only_cross_attention"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries but channels has {levels}"
                )
        for name, width, heads in zip(range(levels), self.channels, self.heads, strict=True):
            if width % self.norm_groups or width % heads:
                raise ValueError(
                    f"channels[{name}] = {width} must be divisible by norm_groups "
                    f"({self.norm_groups}) and by heads ({heads})"
                )
        if (self.class_embedding == "none") != (self.class_embedding_size == 0):
            raise ValueError("class_embedding and class_embedding_size must be set together")
        return self

    @property
    def time_width(self) -> int:
        """Width of the time embedding: four times the finest level's channels."""
        return 4 * self.channels[0]


class VAESpec(Record):
    """The KL autoencoder (published as ``AutoencoderKL``)."""

    in_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    scaling_factor: float = 0.18215
    """Latents are ``posterior sample * scaling_factor``, so that they have unit variance."""
    sample_size: int = 512
    norm_groups: int = 32
    norm_eps: float = 1e-6
    force_float32: bool = False
    """Decode in float32 whatever the dtype (x4 upscaler: overflows in float16)."""

    @property
    def factor(self) -> int:
        """Pixels a latent cell along one side: 8 (SD) or 4 (x4 upscaler)."""
        return 2 ** (len(self.channels) - 1)


class TinyDecoderSpec(Record):
    """A small decoder in the layout of TAESD (published as the decoder of ``AutoencoderTiny``).

    One entry a level, coarsest first, as the published config has them.
    """

    latent_channels: int = 4
    out_channels: int = 3
    channels: tuple[int, ...] = (64, 64, 64, 64)
    """``decoder_block_out_channels``: of each level's convolutions; the published are all equal,
    because a level reads what the one before it wrote."""
    blocks: tuple[int, ...] = (3, 3, 3, 1)
    """``num_decoder_blocks``."""
    scale: float = 1.0
    """What the model's scaled latents are multiplied by before they are read."""

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        if len(self.channels) != len(self.blocks) or len(set(self.channels)) != 1:
            raise ValueError("channels and blocks need one entry a level, channels all equal")
        return self

    @property
    def factor(self) -> int:
        """Pixels a latent cell along one side."""
        return 2 ** (len(self.blocks) - 1)


class TextSpec(Record):
    """A CLIP text tower (``CLIPTextModel``, with projection ``CLIPTextModelWithProjection``)."""

    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    context_length: int = 77
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    norm_eps: float = 1e-5
    projection_width: int = 0
    """0: no projection head."""
    bos_id: int = 49406
    eos_id: int = 49407
    pad_id: int = 49407
    """v1 pads with end-of-text, v2 with id 0; pads do feed cross-attention."""


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Normalisation of every published CLIP's pictures, R G B, of pixels in [0, 1]."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class VisionSpec(Record):
    """A CLIP vision tower (``CLIPVisionModelWithProjection``)."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    norm_eps: float = 1e-5
    projection_width: int = 768


class PictureSpec(Record):
    """How a picture goes into a CLIP tower (``preprocessor_config.json``)."""

    resize: int = 224
    """Shorter side after resizing; 0: not resized."""
    crop: int = 224
    """Side of the square cut from the middle; 0: not cut."""
    resample: int = 3
    """Pillow's number of the filter: bicubic."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


class SafetySpec(Record):
    """A safety checker (``StableDiffusionSafetyChecker``): a vision tower, its input, and how
    many concepts it knows."""

    vision: VisionSpec = VisionSpec()
    pictures: PictureSpec = PictureSpec()
    concepts: int = 17
    special: int = 3
    names: tuple[str, ...] = ()
    """Of the concepts, special ones last; empty where they are hidden, as the published are."""


class ScheduleSpec(Record):
    """The noise schedule a model was trained on, and how its card samples from it."""

    kind: Literal["scaled_linear", "linear", "squared_cosine"] = "scaled_linear"
    """LDM's yaml calls scaled_linear "linear", and linear "sqrt_linear"."""
    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = 1000
    trained_betas: tuple[float, ...] | None = None
    prediction_type: Literal["epsilon", "v", "x0"] = "epsilon"
    zero_terminal_snr: bool = False
    sampler: str = "pndm"
    """The default sampler, by its short name (:mod:`safelight.names`)."""
    spacing: Literal["leading", "trailing", "linspace"] | None = None
    """None: the sampler's own default."""
    steps_offset: int = 1
    final_alpha_one: bool = False
    """``set_alpha_to_one``: the step after the last has alpha-bar 1 instead of alpha-bar[0]."""
    fitted: tuple[float, ...] = ()
    """Timesteps that were found to be the best few for this model, falling: what the schedule
    ``fitted`` visits, or interpolates for other counts. Empty: nobody has looked."""
    options: dict[str, bool | int | float | str] = {}
    """Further published scheduler settings that change the mathematics."""


class PriorSpec(Record):
    """The text-to-image-embedding prior (``PriorTransformer``), and how it is sampled."""

    heads: int = 32
    head_width: int = 64
    layers: int = 20
    embedding_width: int = 768
    text_tokens: int = 77
    extra_tokens: int = 4
    text: TextSpec = TextSpec(projection_width=768)
    """Its own text tower, with projection."""
    schedule: ScheduleSpec = ScheduleSpec(
        kind="squared_cosine",
        prediction_type="x0",
        sampler="ddpm",
        steps_offset=0,
        final_alpha_one=True,
    )
    clip: float | None = 5.0
    """Predicted embeddings are clamped to this, in units of their spread."""
    steps: int = 25
    guidance_scale: float = 4.0


class ModelSpec(Record):
    """A whole system: its networks, its schedule and its card's defaults."""

    name: str
    family: str = "sd-v1"
    """``sd-v1 sd-v2 image-variations unclip depth inpaint x4-upscaler``."""
    unet: UNetSpec
    vae: VAESpec
    tiny_decoder: TinyDecoderSpec | None = None
    """Turns latents into pictures at a fraction of the cost: previews, and ``decoder="tiny"``."""
    student: str = ""
    """The shipped model of few steps that was distilled from this one; empty: there is none."""
    text: TextSpec | None = None
    vision: VisionSpec | None = None
    prior: PriorSpec | None = None
    """Makes picture embeddings from prompts (unCLIP with CLIP L)."""
    schedule: ScheduleSpec = ScheduleSpec()
    noising: ScheduleSpec | None = None
    """Of the noise on the picture that is looked at (unCLIP, x4 upscaler)."""
    steps: int = 50
    """The card's number of sampling steps."""
    guidance_scale: float = 7.5
    words: tuple[str, ...] = ()
    """The only words the model has ever seen, so that a prompt can be told of others; empty for
    a model that has read the open world."""

    @property
    def noise_level(self) -> int | None:
        """The card's, of the noise on the picture that is looked at; None: there is none."""
        return {"unclip": 0, "x4-upscaler": 20}.get(self.family)

    @property
    def max_noise_level(self) -> int:
        """The largest that the model was trained with."""
        return {"x4-upscaler": 350}.get(self.family, 999)

    @property
    def native_size(self) -> int:
        """Side of the native picture, in pixels."""
        return self.unet.sample_size * self.vae.factor
