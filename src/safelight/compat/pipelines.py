"""The pipelines of the five cards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safelight.compat import pictures
from safelight.compat.base import Output, Pipeline
from safelight.compat.pictures import Row, listed
from safelight.errors import InvalidRequest


def _texts(field: str, value: Any) -> list[Row]:
    if isinstance(value, list | tuple) and not value:
        raise InvalidRequest(field, "is an empty list.", "Say what the pictures show.")
    return [{} if each is None else {field: each} for each in listed(value)]


class StableDiffusionPipeline(Pipeline):
    """Text to pictures: SD 1.x, 2.x and small SD."""

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        generator: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """As diffusers' pipeline of this name; other arguments are those of
        :class:`~safelight.request.GenerateRequest`.

        Picture k of one generator is that of its seed + k, where diffusers draws on from the
        generator's state.
        """
        return self._run(
            {
                "prompt": _texts("prompt", prompt),
                "negative_prompt": _texts("negative_prompt", negative_prompt),
            },
            others,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            output_type=output_type,
            return_dict=return_dict,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta or None,
        )


class StableDiffusionImg2ImgPipeline(Pipeline):
    """Text and pictures to pictures, by diffusers' rule of strength."""

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        generator: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """As diffusers' pipeline of this name: pictures of the size that ``image`` has."""
        return self._run(
            {
                "prompt": _texts("prompt", prompt),
                "image": pictures.started_from(others.pop("init_image", image)),
                "negative_prompt": _texts("negative_prompt", negative_prompt),
            },
            others,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            output_type=output_type,
            return_dict=return_dict,
            strength=strength,
            strength_rule="diffusers",
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta or None,
        )


class StableDiffusionImageVariationPipeline(Pipeline):
    """Variations of pictures (Lambda's model, as diffusers calls it)."""

    def __call__(
        self,
        image: Any,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        generator: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """``image``: one, or a list; or the tensor that the card's preprocessing makes, with its
        ``unsqueeze(0)`` or without."""
        return self._run(
            {"image": pictures.looked_at(self.model.model, image)},
            others,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            output_type=output_type,
            return_dict=return_dict,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta or None,
        )


class StableDiffusionImageEmbedPipeline(StableDiffusionImageVariationPipeline):
    """lambda-diffusers' name for it: ``pipe(4 * [image], guidance_scale=3.0)["sample"]``."""

    def __call__(self, input_image: Any, *places: Any, **named: Any) -> Any:
        """As the other, under the name that lambda-diffusers gives to the picture."""
        return super().__call__(input_image, *places, **named)


class StableUnCLIPImg2ImgPipeline(Pipeline):
    """Variations of a picture, with an optional prompt (SD 2.1 unCLIP)."""

    def __call__(
        self,
        image: Any = None,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        generator: Any = None,
        noise_level: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        image_embeds: Any = None,
        **others: Any,
    ) -> Any:
        """``image``: one, a list, or a prepared tensor; the card's order of arguments.

        Args:
            image_embeds: CLIP embeddings ``(B, D)`` instead of pictures.
        """
        if image is not None and image_embeds is not None:
            raise InvalidRequest("image_embeds", "comes with a picture.", "Give one of them.")
        looks = (
            pictures.looked_at(self.model.model, image)
            if image_embeds is None
            else pictures.embeddings(image_embeds)
        )
        return self._run(
            {
                "image": looks,
                "prompt": _texts("prompt", prompt),
                "negative_prompt": _texts("negative_prompt", negative_prompt),
            },
            others,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            output_type=output_type,
            return_dict=return_dict,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta or None,
            noise_level=noise_level,
        )

    def _tuple(self, output: Output) -> tuple[Any, ...]:
        return (output.images,)  # the reference's has no checker to tell of
