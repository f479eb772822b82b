"""What each system of the family can do, and what it needs: asked before anything is computed."""

from __future__ import annotations

from safelight.errors import InvalidRequest
from safelight.request import GenerateRequest
from safelight.runtime.caching import branch_count
from safelight.spec import ModelSpec

STARTS = ("sd-v1", "sd-v2", "inpaint", "depth")
"""Systems that can start from a picture."""
LOOKS = ("image-variations", "unclip")
"""Systems that read a CLIP embedding of one."""
_NOISES = ("unclip", "x4-upscaler")
_USES: dict[str, tuple[str, ...]] = {
    "mask": ("sd-v1", "sd-v2", "inpaint"),
    "depth": ("depth",),
    "strength": STARTS,
    "images": LOOKS,
    "image_weights": LOOKS,
    "image_embedding": LOOKS,
    "picture_fit": LOOKS,
    "noise_level": _NOISES,
}
"""Which systems have a use for a field; those not named here are for all."""


def check(spec: ModelSpec, request: GenerateRequest) -> None:
    """Refuse what the model cannot do, or cannot do without something that is missing.

    Raises:
        InvalidRequest: names the field, and the systems that can.
    """
    family = spec.family
    for field, systems in _USES.items():
        if getattr(request, field) not in (None, ()) and family not in systems:
            raise _useless(spec, field, systems)
    if spec.prior is None or request.looks:
        for field in ("prior_steps", "prior_guidance_scale"):
            if getattr(request, field) is not None:
                raise InvalidRequest(field, f"{spec.name} has no prior to run here.")
    _planes_fit(spec)
    if family == "image-variations":
        for field in ("prompt", "negative_prompt"):
            if getattr(request, field).strip():
                raise InvalidRequest(
                    field,
                    f"{spec.name} makes pictures like other pictures and reads no text.",
                    "Leave it out, or use sd-v1, sd-v2 or unclip.",
                )
    elif spec.text is None:
        raise InvalidRequest("model", f"{spec.name} has no text tower.")
    _needs(spec, request)
    if request.image_embedding is not None:
        width = spec.unet.class_embedding_size // 2 or spec.unet.context_width
        if len(request.image_embedding) != width:
            raise InvalidRequest(
                "image_embedding",
                f"has {len(request.image_embedding)} numbers; {spec.name} reads {width}.",
            )
    _levers(spec, request)
    level, most = request.noise_level, spec.max_noise_level
    if level is not None and level > most and (family, level) != ("unclip", most + 1):
        raise InvalidRequest("noise_level", f"{level} is more than {spec.name}'s {most}.")


def _levers(spec: ModelSpec, request: GenerateRequest) -> None:
    """Fast modes that this model has no part for."""
    unet = spec.unet
    if request.guidance_until is not None and unet.guidance_embedding_size:
        raise InvalidRequest(
            "guidance_until",
            f"{spec.name} has guidance built in: there is none to drop.",
            "Leave it out.",
        )
    most = branch_count(unet) - 1
    if (request.block_cache_branch or 0) > most:
        raise InvalidRequest(
            "block_cache_branch",
            f"{request.block_cache_branch}, but {spec.name}'s last skip connection is {most}.",
        )
    if request.decoder == "tiny" and spec.tiny_decoder is None:
        raise InvalidRequest(
            "decoder",
            f"{spec.name} has no tiny decoder.",
            "Leave it out; for a model of your own give load(..., tiny_decoder=FILE).",
        )


def _useless(spec: ModelSpec, field: str, systems: tuple[str, ...]) -> InvalidRequest:
    return InvalidRequest(
        field,
        f"{spec.name} ({spec.family}) has no use for it.",
        f"Systems that have: {', '.join(systems)}.",
    )


def _needs(spec: ModelSpec, request: GenerateRequest) -> None:
    family = spec.family
    if family in LOOKS:
        given = request.looks or spec.prior is not None
        if not given:
            more = "" if family == "image-variations" else ", or a prior for text alone"
            raise InvalidRequest(
                "image",
                f"is missing: {spec.name} makes pictures like another one.",
                f"Give an image{more}.",
            )
        if request.looks and request.image_embedding is None and spec.vision is None:
            raise InvalidRequest("image", f"{spec.name} has no vision tower to look with.")
        if not request.looks and not request.prompt.strip():
            raise InvalidRequest("prompt", "is empty.", "Say what the picture shows.")
    if family in ("inpaint", "x4-upscaler") and request.image is None:
        does = "repaints" if family == "inpaint" else "enlarges"
        raise InvalidRequest(
            "image",
            f"is missing: {spec.name} {does} a picture.",
            "Give an image, or use sd-v1 or sd-v2 for text alone.",
        )
    if family == "depth" and request.image is None and request.depth is None:
        raise InvalidRequest(
            "depth",
            f"is missing: {spec.name} follows a depth map.",
            "Give depth, or an image to estimate it from.",
        )


def _planes_fit(spec: ModelSpec) -> None:
    latent = spec.vae.latent_channels
    more = {"inpaint": latent + 1, "depth": 1, "x4-upscaler": spec.vae.in_channels}
    wanted = latent + more.get(spec.family, 0)
    label = {"unclip": "projection", "x4-upscaler": "table"}.get(spec.family, "none")
    if spec.unet.in_channels != wanted or spec.unet.class_embedding != label:
        raise InvalidRequest(
            "model",
            f"{spec.name} calls itself {spec.family}, but its UNet reads "
            f"{spec.unet.in_channels} channels and class {spec.unet.class_embedding}.",
        )
