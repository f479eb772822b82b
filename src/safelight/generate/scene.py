"""What a request's pictures look at: the pictures that came with it, as a model's inputs.

Decoding and cropping happens when the scene is made, so that a broken file is told at once; the
networks look at it when the first picture asks, and remember it (``Model.picture_cache``). Each
picture's own noise comes from its seed, a stream for each purpose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image, ImageFilter
from torch import Tensor

from safelight.conditioning import Conditioning, image, planes, unclip
from safelight.diffusion import noise
from safelight.diffusion.grid import Grid
from safelight.diffusion.solvers import add_noise
from safelight.errors import InvalidRequest
from safelight.inputs import PictureInput
from safelight.nets.vae import Posterior
from safelight.request import GenerateRequest
from safelight.store import maps, pictures
from safelight.text import weighting

if TYPE_CHECKING:
    from safelight.model import Model

Box = tuple[int, int, int, int]


class Placed(NamedTuple):
    """Where a picture's run begins."""

    x: Tensor
    """VP latents ``(1, C, h, w)``."""
    grid: Grid
    image: Tensor | None = None
    """Latents to keep where ``mask`` is 0 (inpainting by blending)."""
    mask: Tensor | None = None
    noise: Tensor | None = None
    first: Tensor | None = None
    """What the network sees at the first call instead of ``x``."""


class Scene:
    """The pictures of one request, for one model.

    Raises:
        InvalidRequest: a picture is missing, broken, or says nothing.
    """

    def __init__(self, model: Model, request: GenerateRequest) -> None:
        self.model, self.request = model, request
        self.size = (request.width or 0, request.height or 0)
        self.mask: Image.Image | None = None
        self.box: Box | None = None
        self.depth: Tensor | None = None
        self.image = _opened(request.image, "image")
        self.images = [_opened(given, f"images[{k}]") for k, given in enumerate(request.images)]
        if request.mask is not None:
            self.mask = maps.open_mask(_value(request.mask, "mask"))
        elif model.spec.family == "inpaint" and request.image is not None:
            self.mask = maps.transparency(_value(request.image, "image"))
            if self.mask is None:
                problem = f"is missing: {model.spec.name} repaints what it marks."
                raise InvalidRequest("mask", problem, "Give mask, or alpha in the image.")
        if self.mask is not None and self.image is not None:
            self._lay_mask(self.mask)
        if request.depth is not None:
            values = maps.open_depth(_value(request.depth, "depth"))
            self.depth = torch.from_numpy(values.copy())

    def _lay_mask(self, mask: Image.Image) -> None:
        assert self.image is not None
        mask = mask.resize(self.image.size, Image.Resampling.LANCZOS)
        marked = mask.point([255 * (v >= 128) for v in range(256)]).getbbox()
        if marked is None:
            raise InvalidRequest("mask", "marks nothing.", "White is repainted, black is kept.")
        if self.request.mask_feather:
            mask = mask.filter(ImageFilter.GaussianBlur(self.request.mask_feather / 2))
        self.mask = mask
        if self.request.mask_crop is not None:
            self.box = crop_box(marked, self.request.mask_crop, self.image.size, self.size)

    # -- pictures in, pictures out ---------------------------------------------------------------

    def untouched(self) -> Image.Image:
        """The picture to start from, in the size asked for."""
        assert self.image is not None
        return image.fitted(self.image.crop(self.box) if self.box else self.image, self.size)

    def finished(self, made: Image.Image) -> Image.Image:
        """What was made; where it is a region of a larger picture, pasted into that."""
        if self.box is None:
            return made
        assert self.image is not None
        assert self.mask is not None
        left, top, right, bottom = self.box
        whole = self.image.copy()
        part = made.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        whole.paste(part, self.box, self.mask.crop(self.box))
        return whole

    # -- where a run begins ----------------------------------------------------------------------

    def place(self, seed: int, noise0: Tensor, grid: Grid, *, pure: bool) -> Placed:
        """The start of one picture's run.

        Args:
            noise0: its initial noise.
            pure: from that alone, not from the noised image.
        """
        if self.model.spec.family not in ("sd-v1", "sd-v2", "inpaint", "depth"):
            return Placed(noise0, grid)
        if self.image is None:
            return Placed(noise0, grid)
        blended = self.mask is not None and self.model.spec.family != "inpaint"
        if pure and not blended:
            return Placed(noise0, grid)
        latents = self._latents("image", self.untouched, seed, "posterior")
        noise0 = noise0.to(latents)
        noised = add_noise(latents, noise0, grid.start_sigma)
        if not blended:
            return Placed(noised, grid)
        mask = self._latent_mask().to(latents)
        if not pure:
            return Placed(noised, grid, latents, mask, noise0)
        # The kept part starts on its own path; the network sees pure noise, as the reference shows.
        first = noise0 * grid.init_scale
        grid = dataclasses.replace(grid, init_scale=1.0)
        return Placed(torch.lerp(noised, first, mask), grid, latents, mask, noise0, first)

    # -- what the network is told ----------------------------------------------------------------

    def told(
        self, seed: int, branches: Sequence[Conditioning], negatives: int = 1
    ) -> list[Conditioning]:
        """The text's branches, with what the pictures add to them.

        Args:
            negatives: so many of them, the first, are unconditional.
        """
        model, family = self.model, self.model.spec.family
        dtype, place = model.dtype, model.device
        if family == "image-variations":
            return image.variations(self._embedding(seed).to(place), dtype)
        if family == "unclip":
            embedding = self._embedding(seed)
            level = min(self.request.noise_level or 0, model.spec.max_noise_level)
            extra = noise.stream(seed, embedding.shape, "embedding")
            vector = unclip.class_vector(model, embedding, level, extra).to(place, dtype)
            return [
                dataclasses.replace(branch, vector=vector if k >= negatives else 0 * vector)
                for k, branch in enumerate(branches)
            ]
        changes: dict[str, Any] = {}
        if family == "inpaint":
            changes["planes"] = self._inpaint_planes(seed)
        elif family == "depth":
            height, width = (side // model.spec.vae.factor for side in self.size[::-1])
            changes["planes"] = planes.depth_plane(self._depth(), height, width)
        elif family == "x4-upscaler":
            level = self.request.noise_level or 0
            width, height = (side // model.spec.vae.factor for side in self.size)
            small = width, height
            assert self.image is not None
            pixels = image.to_pixels(
                self.image
                if self.image.size == small
                else self.image.resize(small, Image.Resampling.BICUBIC)
            )
            extra = noise.stream(seed, pixels.shape, "low-resolution")
            changes["planes"] = planes.low_resolution(model, pixels, level, extra)
            changes["vector"] = torch.tensor(level, device=place)
        if "planes" in changes:
            changes["planes"] = changes["planes"].to(place, dtype)
        return [dataclasses.replace(branch, **changes) for branch in branches]

    def _inpaint_planes(self, seed: int) -> Tensor:
        mask = planes.hard(self._mask_pixels())

        def masked() -> Tensor:
            return image.to_pixels(self.untouched()) * (mask < 0.5)

        latents = self._latents("masked", masked, seed, "masked-posterior")
        factor = self.model.spec.vae.factor
        return planes.inpaint_planes(planes.latent_mask(mask, factor, soft=False), latents)

    def _mask_pixels(self) -> Tensor:
        assert self.mask is not None
        mask = self.mask.crop(self.box) if self.box else self.mask
        if mask.size != self.size:
            mask = mask.resize(self.size, Image.Resampling.LANCZOS)
        return planes.mask_plane(mask)

    def _latent_mask(self) -> Tensor:
        mask, soft = self._mask_pixels(), self.request.mask_feather > 0
        factor = self.model.spec.vae.factor
        return planes.latent_mask(mask if soft else planes.hard(mask), factor, soft=soft)

    def _latents(
        self, what: str, look: Callable[[], Image.Image | Tensor], seed: int, stream: str
    ) -> Tensor:
        request = self.request
        given = [each.digest for each in (request.image, request.mask) if each is not None]
        seen = self._once((what, *given, request.mask_feather, self.size, self.box), look)
        return image.to_latents(self.model, seen, noise.stream(seed, seen.mean.shape, stream))

    @torch.inference_mode()
    def _once(self, key: Hashable, look: Callable[[], Image.Image | Tensor]) -> Posterior:
        known = self.model.picture_cache.get(key)
        if known is None:
            found = look()
            pixels = found if isinstance(found, Tensor) else image.to_pixels(found)
            known = image.posterior(self.model, pixels)
            self.model.picture_cache.put(key, known)
        return known

    def _embedding(self, seed: int) -> Tensor:
        request, model = self.request, self.model
        if request.image_embedding is not None:
            return torch.tensor(request.image_embedding, device=model.device)
        if not request.looks:
            assert model.prior is not None
            # The prior reads one sentence, as the reference's: weights are the decoder's.
            said = weighting.parse(request.prompt, request.weighting)
            return model.prior.sample(
                request.prompt if request.weighting == "none" else said.words(request.steps or 1),
                seed,
                steps=request.prior_steps,
                guidance_scale=request.prior_guidance_scale,
            )
        given = request.images or ((request.image,) if request.image else ())
        fit = request.picture_fit or "crop"
        key = ("embedding", *(each.digest for each in given), request.image_weights, fit)
        known = model.picture_cache.get(key)
        if known is None:
            found = [each for each in (*self.images, self.image) if each is not None]
            known = image.embed(model, found, request.image_weights, fit)
            model.picture_cache.put(key, known)
        return known

    def _depth(self) -> Tensor:
        if self.depth is not None:
            return self.depth
        assert self.request.image is not None
        assert self.image is not None
        key = ("depth", self.request.image.digest)
        known = self.model.picture_cache.get(key)
        if known is None:
            known = planes.estimate_depth(self.model, self.image)
            self.model.picture_cache.put(key, known)
        return known


def crop_box(marked: Box, padding: int, whole: tuple[int, int], shape: tuple[int, int]) -> Box:
    """The region around a mask, of the shape that is made, inside the picture.

    Args:
        marked: the mask's bounds.
        padding: pixels around them, at least.
        whole: the picture's size.
        shape: width and height of what is made; where the picture has no room for its shape, the
            region is squeezed.
    """
    sides = [min(whole[k], marked[k + 2] - marked[k] + 2 * padding) for k in (0, 1)]
    grown = max(sides[0] / shape[0], sides[1] / shape[1])
    sides = [min(whole[k], max(sides[k], round(grown * shape[k]))) for k in (0, 1)]
    starts = []
    for k in (0, 1):
        middle = (marked[k] + marked[k + 2]) / 2
        starts.append(max(0, min(whole[k] - sides[k], round(middle - sides[k] / 2))))
    return (starts[0], starts[1], starts[0] + sides[0], starts[1] + sides[1])


def _value(given: PictureInput, field: str) -> Any:
    if given.value is None:
        raise InvalidRequest(
            field,
            f"is known by its digest alone ({given.digest[:19]}…).",
            "Give the file again.",
        )
    return given.value


def _opened(given: PictureInput | None, field: str) -> Image.Image | None:
    return None if given is None else pictures.open_picture(_value(given, field), field=field)
