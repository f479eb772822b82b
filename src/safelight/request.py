"""What a caller asks for, and what comes back. No torch.

A :class:`GenerateRequest` is checked completely when it is made, before any model is loaded: every
mistake becomes an :class:`~safelight.errors.InvalidRequest` that names the field as the caller
wrote it. Its canonical JSON is what a picture carries, its digest what two requests are compared
by.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from safelight import fast, names
from safelight.errors import InvalidRequest
from safelight.fields import (
    MAX_SIDE,
    Flag,
    Number,
    Picture,
    Pictures,
    Row,
    Side,
    Text,
    Whole,
    invalid,
    number,
    pairs,
    shown,
    whole,
)
from safelight.inputs import PictureInput, enlarged, fitting, is_digest
from safelight.spec import ModelSpec, Record
from safelight.verdict import Moderated, Policy, Verdict

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEMA = 1
"""Number of the request's JSON schema; raised when a field changes its meaning."""
FIRST = (
    *("prompt", "negative_prompt", "steps", "guidance_scale", "guidance_rescale"),
    *("guidance_interval", "sampler", "schedule", "sampler_options", "eta", "width", "height"),
    *("seed", "count", "clip_skip", "weighting", "deterministic", "preview_every"),
)
"""Fields of the first requests that were written into pictures."""
MAX_SEED = 2**63 - 1
_ETA = ("ddim", "euler-a")

ALIASES: dict[str, str] = {
    "negative": "negative_prompt",
    "num_inference_steps": "steps",
    "sampling_steps": "steps",
    "cfg_scale": "guidance_scale",
    "cfg": "guidance_scale",
    "scale": "guidance_scale",
    "sampler_name": "sampler",
    "sampling_method": "sampler",
    "scheduler": "schedule",  # or, as in diffusers, the sampler: see from_kwargs
    "schedule_type": "schedule",
    "num_images_per_prompt": "count",
    "n_iter": "count",
    "n": "count",
    "batch_size": "count",
    "batch_count": "count",
    "images_per_prompt": "count",
    "num_images": "count",
    "w": "width",
    "h": "height",
    "dialect": "weighting",
    "prompt_weighting": "weighting",
    "prompt_dialect": "weighting",
    "preview_interval": "preview_every",
    "init_image": "image",
    "input_image": "image",
    "mask_image": "mask",
    "mask_blur": "mask_feather",
    "padding_mask_crop": "mask_crop",
    "depth_map": "depth",
    "denoising_strength": "strength",
    "image_embeds": "image_embedding",
    "prior_num_inference_steps": "prior_steps",
    "lora": "loras",
    "lora_name": "loras",
    "textual_inversions": "embeddings",
}
"""What other programs call a field. A1111's ``batch_size`` and ``n_iter`` together multiply."""


class GenerateRequest(Record):
    """What pictures to make. None means "as the model's card has it"; :meth:`resolved` fills it in.

    Which of the pictures that may come with it a model looks at is the model's business: asking
    for what it cannot do is an error, before anything is computed.

    Raises:
        InvalidRequest: on any wrong field, from the constructor, :meth:`replace`,
            :meth:`from_kwargs` and :meth:`from_json` alike.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    prompt: Text = ""
    """May be empty where a picture or an embedding says what to make."""
    negative_prompt: Text = ""
    steps: Annotated[Whole, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[Number, Field(ge=0, le=1000)] | None = None
    """1 or less: no guidance."""
    guidance_rescale: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """Lin et al. 2024, Eq. 16; 0.7 is the paper's choice."""
    guidance_interval: tuple[Annotated[Number, Field(ge=0)], Number] | None = None
    """Noise levels (low, high) between which guidance acts; elsewhere the prompt alone does."""
    sampler: str | None = None
    """Any spelling of :mod:`safelight.names`; kept as the short name."""
    schedule: str | None = None
    """Spacing of the steps; a schedule in the sampler's name ("Karras") is moved here."""
    sampler_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Further options of the solver."""
    eta: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Share of fresh noise a step: ``ddim`` (0 by default) and ``euler-a`` (1)."""
    width: Side | None = None
    height: Side | None = None
    seed: Annotated[Whole, Field(ge=0, le=MAX_SEED)] | None = None
    """Of the first picture; picture k has seed + k. None or -1 draws one."""
    count: Annotated[Whole, Field(ge=1, le=1000)] = 1
    clip_skip: Annotated[Whole, Field(ge=0, le=11)] | None = None
    """Text layers left out at the end, as diffusers counts. A1111 counts one more, under the name
    ``CLIP_stop_at_last_layers``."""
    weighting: Literal["none", "a1111", "compel"] = "none"
    """Dialect of the prompts: word weights and more, see docs/prompts.md."""
    loras: tuple[tuple[str, Annotated[Number, Field(ge=-100, le=100)]], ...] = ()
    """Adapters and how strongly each acts: (file, or name in the folder of them, scale). A name
    alone counts as 1."""
    embeddings: tuple[tuple[str, str], ...] = ()
    """Textual inversions: (file or name, the word that prompts use it by; empty: its own)."""
    deterministic: Flag = False
    """One picture a network call, so that pictures are equal bit by bit in any company."""
    preview_every: Annotated[Whole, Field(ge=0, le=1000)] = 0
    """Steps between previews; 0 for none."""
    safety: Policy | None = None
    """What to do with a flagged picture. None: as the cards have it (flag it and give a black
    picture) where the model has a checker."""

    # Pictures.
    image: Picture | None = None
    """The picture to start from (text-to-image, depth), to repaint (inpainting), to enlarge (x4),
    or to make others like (variations, unCLIP)."""
    images: Pictures = ()
    """Several pictures to make others like, mixed by ``image_weights``."""
    image_weights: Row | None = None
    """One a picture; they are divided by their sum. None: equal."""
    mask: Picture | None = None
    """White is repainted. With an alpha channel: transparent is."""
    mask_feather: Annotated[Whole, Field(ge=0, le=256)] = 0
    """Pixels over which the mask's edge is softened."""
    mask_crop: Annotated[Whole, Field(ge=0, le=4096)] | None = None
    """Repaint the mask's surroundings alone, with so many pixels around it, and paste them into
    the picture as it came. None: the whole picture."""
    depth: Picture | None = None
    """A depth map; larger is nearer (MiDaS). None: made from ``image`` by the model's estimator."""
    strength: Annotated[Number, Field(ge=0, le=1)] | None = None
    """How much of ``image`` is made anew: 0 gives it back, 1 starts from pure noise."""
    strength_rule: Literal["exact", "diffusers"] = "exact"
    """``exact`` runs all the steps, from the noise level that the strength says; ``diffusers`` the
    last ``int(steps * strength)``, and at 1 keeps a trace of the image."""
    noise_level: Annotated[Whole, Field(ge=0, le=1000)] | None = None
    """Noise put on the picture that is looked at: unCLIP 0..999, x4 0..350."""
    image_embedding: Row | None = None
    """A CLIP picture embedding instead of a picture (variations, unCLIP)."""
    picture_fit: Literal["crop", "square"] | None = None
    """How CLIP sees a picture: ``crop`` the middle of it (the published folders), ``square`` all of
    it, squashed without antialiasing (as the models were trained)."""
    prior_steps: Annotated[Whole, Field(ge=1, le=1000)] | None = None
    prior_guidance_scale: Annotated[Number, Field(ge=0, le=1000)] | None = None
    """Of the prior, which makes a picture embedding from the prompt (unCLIP l)."""

    # Fast modes: docs/fast.md has what each costs. None: off, unless ``fast`` fills it in.
    fast: Annotated[Whole, Field(ge=0, le=3)] | None = None
    """A preset of the fields below (and of steps and sampler) that were not given; 0: none. See
    :mod:`safelight.fast`; a resolved request names the fields instead."""
    guidance_until: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Share of the steps after which guidance is dropped: the prompt's branch alone is asked."""
    freeze_context: Flag | None = None
    """From there on cross-attention says what it said at the last guided step (T-GATE)."""
    block_cache: Annotated[Whole, Field(ge=1, le=50)] | None = None
    """Run the whole UNet once in so many calls, between them its outer layers alone (DeepCache)."""
    block_cache_branch: Annotated[Whole, Field(ge=0, le=100)] | None = None
    """How far in the outer layers reach: the skip connection that stays live; 0: the first."""
    block_cache_spacing: Literal["uniform", "quadratic"] | None = None
    """Where the whole calls are: evenly, or closest together a third into the run."""
    decoder: Literal["full", "tiny"] | None = None
    """What turns latents into the picture: ``tiny`` where the model has such a decoder."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise invalid(error, lambda name: _closest(name, type(self))) from None

    @field_validator("seed", mode="before")
    @classmethod
    def _random(cls, value: Any) -> Any:
        return None if value is None or (whole(value) == -1) else value

    @field_validator("guidance_interval", mode="before")
    @classmethod
    def _ordered(cls, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != 2:
            raise ValueError(f"must be two noise levels (low, high), not {shown(value)}.")
        low, high = (number(v) for v in value)
        if math.isfinite(low) and math.isfinite(high) and low >= high:
            raise ValueError(f"must rise: {low:g} is not below {high:g}.")
        return (low, high)

    @field_validator("loras", mode="before")
    @classmethod
    def _scaled(cls, value: Any) -> Any:
        return pairs(value, 1.0)

    @field_validator("embeddings", mode="before")
    @classmethod
    def _worded(cls, value: Any) -> Any:
        return pairs(value, "")

    @model_validator(mode="before")
    @classmethod
    def _plain_names(cls, fields: Any) -> Any:
        """Short names for sampler and schedule, whatever they were called."""
        if not isinstance(fields, Mapping):
            return fields
        fields = dict(fields)
        if isinstance(fields.get("image"), list | tuple):  # diffusers' way to give several
            if fields.get("images"):
                raise InvalidRequest("images", "comes with several in image.", "Give one of them.")
            fields["images"] = fields.pop("image")
        schedule = fields.get("schedule")
        if schedule is not None and not isinstance(schedule, str):
            raise InvalidRequest("schedule", f"must be a name, not {shown(schedule)}.")
        fields["schedule"] = names.schedule(schedule)
        if fields.get("sampler") is not None:
            choice = names.sampler(fields["sampler"])
            fields["sampler"] = choice.sampler
            fields["schedule"] = fields["schedule"] or choice.schedule
            if choice.options:
                fields["sampler_options"] = {
                    **dict(choice.options),
                    **(fields.get("sampler_options") or {}),
                }
        return fields

    @model_validator(mode="after")
    def _eta_is_for_its_sampler(self) -> Self:
        if self.eta is not None and self.sampler is not None and self.sampler not in _ETA:
            fix = f"Leave it out, or use {' or '.join(_ETA)}."
            raise InvalidRequest("eta", f"{self.sampler} has no such setting.", fix)
        return self

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.prompt.strip() and not self.looks and self.depth is None:
            problem = "is empty." if "prompt" in self.model_fields_set else "is missing."
            raise InvalidRequest("prompt", problem, "Say what the picture shows.")
        return self

    @model_validator(mode="after")
    def _pictures_agree(self) -> Self:
        if self.image is not None and self.images:
            raise InvalidRequest("images", "comes with image.", "Give all of them in images.")
        if self.image_embedding is not None and (self.image is not None or self.images):
            raise InvalidRequest("image_embedding", "comes with a picture.", "Give one of them.")
        given = len(self.images) or int(self.image is not None)
        if self.image_weights is not None:
            if len(self.image_weights) != given:
                problem = f"{len(self.image_weights)} weights for {given} pictures."
                raise InvalidRequest("image_weights", problem)
            if sum(self.image_weights) <= 0:
                raise InvalidRequest("image_weights", "their sum must be above 0.")
        if self.image is None:
            for name in ("mask", "strength"):
                if getattr(self, name) is not None:
                    raise InvalidRequest(name, "needs an image.", "Give image too.")
        if self.mask is None and self.mask_crop is not None:
            raise InvalidRequest("mask_crop", "needs a mask.", "Give mask too.")
        return self

    @model_validator(mode="after")
    def _levers_agree(self) -> Self:
        for name in ("block_cache_branch", "block_cache_spacing"):
            if getattr(self, name) is not None and self.block_cache is None and not self.fast:
                raise InvalidRequest(name, "needs block_cache.", "Give block_cache=2 or more.")
        if self.freeze_context and self.guidance_until is None and not self.fast:
            raise InvalidRequest(
                "freeze_context", "needs guidance_until.", "Say from where on: 0.5 is half way."
            )
        return self

    @property
    def looks(self) -> bool:
        """Whether a picture, or its embedding, comes with it."""
        return self.image is not None or bool(self.images) or self.image_embedding is not None

    @property
    def pictures(self) -> dict[str, PictureInput]:
        """Every picture that comes with it, by a name for messages."""
        named = {name: getattr(self, name) for name in ("image", "mask", "depth")}
        several = {f"images[{k}]": given for k, given in enumerate(self.images)}
        return {name: given for name, given in {**named, **several}.items() if given is not None}

    def given(self, **again: Any) -> Self:
        """A request that was read back from JSON, with its pictures given again.

        Args:
            again: by field, those that are known by their digest alone; others are left out.

        Raises:
            InvalidRequest: a file is not the one that the request was made with.
        """
        changes: dict[str, Any] = {}
        for name, value in again.items():
            known = getattr(self, name)
            if not known or value is None:
                continue
            made = getattr(self.replace(**{name: value}), name)
            pairs = zip(made, known, strict=False) if name == "images" else [(made, known)]
            for new, old in pairs:
                if old.digest.startswith("sha256:") and new.digest != old.digest:
                    raise InvalidRequest(
                        name,
                        f"is not the file it was made from: that has {old.digest}.",
                        "Find it with sha256sum.",
                    )
            changes[name] = made
        return self.replace(**changes)

    def replace(self, **changes: Any) -> Self:
        """A copy with ``changes``, checked again."""
        return type(self)(**{**dict(self), **changes})

    @classmethod
    def from_kwargs(cls, **arguments: Any) -> Self:
        """A request from keyword arguments in any program's spelling (:data:`ALIASES`).

        Raises:
            InvalidRequest: an unknown name (the message says the closest known one), the same
                field twice, or a wrong value; ``.field`` is the name as it was written.
        """
        fields: dict[str, Any] = {}
        written: dict[str, str] = {}
        for name, value in _whole_fields(arguments).items():
            plain = ALIASES.get(name, name)
            if name == "scheduler" and isinstance(value, str) and _is_sampler(value):
                plain = "sampler"
            if name.lower() == "clip_stop_at_last_layers":
                plain, value = "clip_skip", _skipped(name, value)
            if plain not in cls.model_fields:
                raise InvalidRequest(name, "is not an argument.", _closest(name, cls))
            if plain in fields:
                if {name, written[plain]} != {"batch_size", "n_iter"}:
                    raise InvalidRequest(name, f"means the same as {written[plain]}.", "Give one.")
                value = _product(fields[plain], value, written[plain], name)
            fields[plain], written[plain] = value, name
        try:
            return cls(**fields)
        except InvalidRequest as error:
            name = written.get(error.field, error.field)
            raise InvalidRequest(name, error.problem, error.fix) from None

    def resolved(self, spec: ModelSpec) -> Self:
        """The same request with every choice made: the card's defaults, and a seed.

        ``schedule`` and ``eta`` may stay None: the model's own spacing, the sampler's own noise.
        A seed that is drawn is below 2^32, where diffusers draws the same noise. ``fast`` has
        become the fields it stands for.

        Raises:
            InvalidRequest: the model cannot make pictures of this size.
        """
        if self.fast is not None:
            return self.replace(**fast.expanded(self, spec), fast=None).resolved(spec)
        width, height = self._fitting_size(spec)
        for name, side in (("width", width), ("height", height)):
            if side % spec.vae.factor:
                raise InvalidRequest(
                    name, f"{spec.name} needs a multiple of {spec.vae.factor}, not {side}."
                )
        return self.replace(
            steps=spec.steps if self.steps is None else self.steps,
            guidance_scale=(
                spec.guidance_scale if self.guidance_scale is None else self.guidance_scale
            ),
            sampler=self.sampler or spec.schedule.sampler,  # checks eta against it
            width=width,
            height=height,
            seed=secrets.randbelow(2**32) if self.seed is None else self.seed,
            **self._picture_defaults(spec),
        )

    def _fitting_size(self, spec: ModelSpec) -> tuple[int, int]:
        """As asked for; else the picture's own shape where it is started from; else the model's."""
        native, looks_only = spec.native_size, spec.family in ("image-variations", "unclip")
        if self.width and self.height:
            return self.width, self.height
        if self.image is None or looks_only or self.mask_crop is not None:
            return self.width or native, self.height or native
        try:
            if spec.family == "x4-upscaler":
                return enlarged(self.image.size, spec.vae.factor, MAX_SIDE)
            step = max(8, spec.vae.factor)
            width, height = fitting(self.image.size, native, step, self.width, self.height)
        except ValueError as error:
            raise InvalidRequest("image", str(error)) from None
        return min(MAX_SIDE, width), min(MAX_SIDE, height)

    def _picture_defaults(self, spec: ModelSpec) -> dict[str, Any]:
        """The cards' defaults of what only some systems have."""
        found: dict[str, Any] = {}
        starts = spec.family not in ("image-variations", "unclip", "x4-upscaler")
        if starts and self.image is not None and self.strength is None:
            found["strength"] = 1.0 if spec.family == "inpaint" or self.mask is not None else 0.8
        if spec.noise_level is not None and self.noise_level is None:
            found["noise_level"] = spec.noise_level
        if spec.prior is not None and not self.looks:
            found["prior_steps"] = self.prior_steps or spec.prior.steps
            if self.prior_guidance_scale is None:
                found["prior_guidance_scale"] = spec.prior.guidance_scale
        return found

    def picture(self, index: int) -> Self:
        """The request for picture ``index`` alone. Needs a seed."""
        if self.seed is None:
            raise ValueError("a request without a seed has no pictures yet: call resolved() first")
        return self.replace(seed=(self.seed + index) % (MAX_SEED + 1), count=1)

    def canonical(self) -> str:
        """JSON that is equal for equal requests: every field, sorted, with the schema's number.

        Fields that came after the first ones stand there only where they are not at their
        default, so that what older versions wrote keeps its digest.
        """
        fields = self.model_dump(mode="json")
        for name, info in type(self).model_fields.items():
            if name not in FIRST and getattr(self, name) == info.default:
                del fields[name]
        return canonical_json({"schema": SCHEMA, **fields})

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`canonical`, in hexadecimal."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> Self:
        """Reads :meth:`canonical`, as text or parsed.

        Raises:
            InvalidRequest: not JSON, another schema, or a wrong field.
        """
        try:
            fields = json.loads(text) if isinstance(text, str) else dict(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidRequest("request", f"is not JSON: {error}.") from None
        if not isinstance(fields, dict):
            raise InvalidRequest("request", "is not a JSON object.")
        schema = fields.pop("schema", None)
        if schema != SCHEMA:
            raise InvalidRequest(
                "schema", f"is {shown(schema)}, this version reads {SCHEMA}.", "Update safelight."
            )
        for name in ("image", "mask", "depth", "images"):
            given = fields.get(name) or []
            for each in given if isinstance(given, list) else [given]:
                if not is_digest(each):  # JSON comes from files of others: it opens none of ours
                    raise InvalidRequest(name, f"is no digest: {shown(each)}.")
        return cls(**fields)


def canonical_json(value: Any) -> str:
    """Sorted, without spaces, ASCII only, no NaN: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _is_sampler(name: str) -> bool:
    try:
        names.schedule(name)
    except InvalidRequest:
        try:
            names.sampler(name)
        except InvalidRequest:
            return False
        return True
    return False


def _skipped(name: str, value: Any) -> int | None:
    """Layers left out, where A1111 counts which one from the end is the last: 1 is all of them."""
    if value is None:
        return None
    try:
        number = whole(value)
    except ValueError as error:
        raise InvalidRequest(name, str(error)) from None
    if number < 1:
        raise InvalidRequest(name, f"must be at least 1, not {number}.")
    return number - 1


def _whole_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """DeepInfra's fields that are halves or answers of ours: whether to read weights
    (``use_compel``), and a LoRA's name apart from its scale, where no name is no LoRA."""
    fields = dict(arguments)
    if (compel := fields.pop("use_compel", None)) is not None:
        if not isinstance(compel, bool):
            raise InvalidRequest("use_compel", f"must be true or false, not {shown(compel)}.")
        if compel:
            if any(ALIASES.get(name, name) == "weighting" for name in fields):
                raise InvalidRequest("use_compel", "comes with another dialect.", "Give one.")
            fields["weighting"] = "compel"
    scale = fields.pop("lora_scale", None)
    for name in ("lora", "lora_name"):
        if fields.get(name) == "":
            del fields[name]
        elif scale is not None and isinstance(fields.get(name), str):
            fields[name], scale = [(fields[name], scale)], None
    if scale is not None and "loras" in {ALIASES.get(name, name) for name in fields}:
        raise InvalidRequest("lora_scale", "is for one LoRA by its name.", "Give loras=[(name, 1)]")
    return fields


def _product(a: Any, b: Any, first: str, second: str) -> int:
    for name, value in ((first, a), (second, b)):
        try:
            number = whole(value)
        except ValueError as error:
            raise InvalidRequest(name, str(error)) from None
        if number < 1:
            raise InvalidRequest(name, f"must be at least 1, not {number}.")
    return whole(a) * whole(b)


def _closest(name: str, cls: type[GenerateRequest]) -> str:
    known = [*cls.model_fields, *ALIASES]
    found = get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    if found:
        plain = ALIASES.get(found[0], found[0])
        return f"Did you mean {found[0]}?" if plain == found[0] else f"Did you mean {plain}?"
    return f"Known: {', '.join(sorted(cls.model_fields))}."


# -- results ------------------------------------------------------------------------------------


class Outcome(StrEnum):
    """How a picture ended."""

    ok = "ok"
    nsfw = "nsfw"
    """Flagged by the safety checker; what was done about it is in the message."""
    rejected = "rejected"
    """Removed: by the safety checker under the policy ``reject``, or by moderation. The message
    says why; there is no picture."""
    nan_recovered = "nan_recovered"
    """Numbers overflowed and the decoder was run again in float32: the picture is good."""
    nan = "nan"
    """Numbers overflowed and could not be saved: there is no picture."""
    cancelled = "cancelled"
    out_of_memory = "out_of_memory"
    """Memory ran out, and ran out again on a cheaper plan: there is no picture."""
    error = "error"


@dataclass(frozen=True)
class ImageResult:
    """One picture, or why there is none.

    Args:
        image: RGB; None unless ``outcome`` is ``ok``, ``nsfw`` or ``nan_recovered``.
        seed: this picture's own: asking for it alone gives this picture.
        outcome: what happened.
        message: for people: why there is no picture, or what was done about it.
        metadata: what is written into a file; see :mod:`safelight.provenance`.
        request: this picture's own request, resolved, ``count`` 1.
        notices: what the caller should know: words the model has never heard, long prompts.
        index: its place among the pictures of the call.
        safety: what the safety checker said; None where the model has none.
        moderation: what a moderation service said, of the prompt and of the picture.
    """

    image: Image | None
    seed: int
    outcome: Outcome
    request: GenerateRequest
    message: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    notices: tuple[str, ...] = ()
    index: int = 0
    safety: Verdict | None = None
    moderation: tuple[Moderated, ...] = ()

    @property
    def nsfw(self) -> bool | None:
        """Whether the safety checker flagged it; None (never False) where nobody looked."""
        return None if self.safety is None else self.safety.nsfw

    def replace(self, **changes: Any) -> ImageResult:
        """A copy with ``changes``."""
        return dataclasses.replace(self, **changes)
