"""The pipelines of the five cards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safelight.compat.schedulers import Scheduler, read
from safelight.errors import InvalidRequest, SafelightError

if TYPE_CHECKING:
    from PIL.Image import Image

    from safelight.generate import Generator
    from safelight.request import ImageResult

_IGNORED = ("use_safetensors", "low_cpu_mem_usage", "device_map", "cache_dir", "token")
"""Arguments of ``from_pretrained`` that need no doing here."""


@dataclass(frozen=True)
class Output:
    """Pictures, by attribute (``.images``) or key (``["sample"]``, ``["images"]``).

    Args:
        nsfw_content_detected: one a picture; None where the model has no checker.
        results: the same with everything Safelight knows of them.
    """

    images: list[Image]
    nsfw_content_detected: list[bool] | None
    results: list[ImageResult]

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, int):
            return (self.images, self.nsfw_content_detected)[key]
        if key in ("sample", "images"):
            return self.images
        if key == "nsfw_content_detected":
            return self.nsfw_content_detected
        raise KeyError(key)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.images, self.nsfw_content_detected))


class Pipeline:
    """What the faces share: loading, moving, the scheduler, seeds, results."""

    def __init__(self, name: str | Path, **options: Any) -> None:
        self._name, self._options = name, options
        self._generator: Generator | None = None
        self._scheduler: Scheduler | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        torch_dtype: Any = None,
        variant: str | None = None,
        variation: str | None = None,
        revision: str | None = None,
        local_files_only: bool | None = None,
        **options: Any,
    ) -> Self:
        """A model by name, folder, file or hub id. It is loaded when it is first needed, so
        that ``.to("cuda")`` in the next line costs nothing.

        Args:
            variation: the unCLIP card's slip for ``variant``.
            revision: a hub branch; ``fp16``, as old code says, means that variant.

        Raises:
            InvalidRequest: an unknown argument.
        """
        if revision in ("fp16", "non_ema"):
            variant, revision = variant or revision, None
        if revision is not None and "@" not in str(name):
            name = f"{name}@{revision}"
        unknown = [key for key in options if key not in _IGNORED]
        for key in ("safety_checker", "feature_extractor", "requires_safety_checker"):
            if key in unknown and not options[key]:
                unknown.remove(key)
        if unknown:
            raise InvalidRequest(unknown[0], "is not supported by this face.", "See safelight.load")
        arguments: dict[str, Any] = {
            "dtype": torch_dtype,
            "variant": variant or variation,
            "local_only": local_files_only,
        }
        pipe = cls(name, **{key: value for key, value in arguments.items() if value is not None})
        pipe._unchecked = "safety_checker" in options and options["safety_checker"] is None
        return pipe

    _unchecked = False

    def to(self, *places: Any, **named: Any) -> Self:
        """To a device, a dtype or both, as ``torch.nn.Module.to`` takes them."""
        import torch

        for place in (*places, *named.values()):
            if place is None or isinstance(place, bool):
                continue
            self._options["dtype" if isinstance(place, torch.dtype) else "device"] = place
            self._generator = None
        return self

    @property
    def model(self) -> Generator:
        """What runs behind this face, loaded at first use."""
        if self._generator is None:
            from safelight.generate import load

            self._generator = load(self._name, **self._options)
        return self._generator

    @property
    def scheduler(self) -> Scheduler:
        """The sampler in use; assign one of :mod:`safelight.compat`'s, or of diffusers'."""
        if self._scheduler is None:
            from safelight.store.schedulers import scheduler_config

            config = scheduler_config(self.model.model.spec.schedule)
            own = {kind.__name__: kind for kind in Scheduler.__subclasses__()}
            self._scheduler = own[config["_class_name"]](**config)
            self._scheduler.sampler = self._scheduler.spacing = None  # the model's own
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self._scheduler = read(scheduler)

    def set_progress_bar_config(self, **_: Any) -> None:
        """Nothing: no bar is printed. ``safelight.load(...).stream`` tells progress."""

    def enable_attention_slicing(self, *_: Any) -> None:
        """Nothing: attention is never materialised."""

    def enable_xformers_memory_efficient_attention(self, *_: Any) -> None:
        """Nothing: attention is never materialised."""

    def _run(
        self,
        prompts: list[str],
        count: int,
        generator: Any,
        output_type: str,
        return_dict: bool,
        **arguments: Any,
    ) -> Any:
        if output_type not in ("pil", "np"):
            raise InvalidRequest("output_type", f"{output_type!r} is not supported.", "pil or np.")
        chosen = self._scheduler
        if chosen is not None and chosen.sampler is not None:
            arguments["sampler"] = chosen.sampler
            arguments["schedule"] = arguments.get("schedule") or chosen.spacing
        if self._unchecked:
            arguments["safety"] = "off"
        given = {key: value for key, value in arguments.items() if value is not None}
        results: list[ImageResult] = []
        seeds = _seeds(generator, len(prompts) * count)
        if seeds is None:
            results = self.model.generate(prompts, count=count, **given)
        else:
            repeated = [prompt for prompt in prompts for _ in range(count)]
            results = self.model.generate(repeated, seed=seeds, **given)
        output = _output(results)
        if output_type == "np":
            import numpy as np

            pictures: Any = np.stack([np.asarray(p, np.float32) / 255 for p in output.images])
            output = Output(pictures, output.nsfw_content_detected, output.results)
        return output if return_dict else (output.images, output.nsfw_content_detected)


def _seeds(generator: Any, count: int) -> list[int] | None:
    """Seeds of pictures from torch generators: one each, or one for all, numbered through."""
    if generator is None:
        return None
    if isinstance(generator, Sequence):
        if len(generator) != count:
            problem = f"{len(generator)} generators for {count} pictures."
            raise InvalidRequest("generator", problem)
        return [each.initial_seed() for each in generator]
    return [generator.initial_seed() + k for k in range(count)]


def _output(results: list[ImageResult]) -> Output:
    images: list[Image] = []
    for result in results:
        if result.image is None:
            raise SafelightError(f"no picture for seed {result.seed}: {result.message}")
        images.append(result.image)
    verdicts = [result.metadata.get("safety") for result in results]
    known = any(isinstance(verdict, dict) and verdict.get("checked") for verdict in verdicts)
    flagged = [str(result.outcome) == "nsfw" for result in results] if known else None
    return Output(images, flagged, results)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


class StableDiffusionPipeline(Pipeline):
    """Text to pictures: SD 1.x, 2.x and small SD."""

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
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
            _listed(prompt),
            num_images_per_prompt,
            generator,
            output_type,
            return_dict,
            height=height,
            width=width,
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            eta=eta or None,
            **others,
        )


class StableDiffusionImg2ImgPipeline(StableDiffusionPipeline):
    """Text and a picture to pictures, by diffusers' rule of strength."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str],
        image: Any,
        strength: float = 0.8,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        **others: Any,
    ) -> Any:
        """As diffusers' pipeline of this name."""
        return super().__call__(
            prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            image=image,
            strength=strength,
            strength_rule="diffusers",
            **others,
        )


class _FromPictures(Pipeline):
    """One call a picture: pictures to others like them."""

    def _each(
        self,
        images: Any,
        prompts: list[str],
        count: int,
        generator: Any,
        output_type: str,
        return_dict: bool,
        **arguments: Any,
    ) -> Any:
        pictures = _listed(images)
        if len(prompts) == 1:
            prompts *= len(pictures)
        if len(prompts) != len(pictures):
            problem = f"{len(prompts)} prompts for {len(pictures)} pictures."
            raise InvalidRequest("prompt", problem)
        seeds = _seeds(generator, count * len(pictures))
        if seeds is None:
            import secrets

            first = secrets.randbelow(2**32)
            seeds = [first + k for k in range(count * len(pictures))]
        outputs = [
            self._run(
                [prompt],
                count,
                [_Seed(seed) for seed in seeds[k * count : (k + 1) * count]],
                "pil",
                True,
                image=picture,
                **arguments,
            )
            for k, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True))
        ]
        whole = _output([result for output in outputs for result in output.results])
        if output_type not in ("pil", "np"):
            raise InvalidRequest("output_type", f"{output_type!r} is not supported.", "pil or np.")
        if output_type == "np":
            import numpy as np

            made: Any = np.stack([np.asarray(p, np.float32) / 255 for p in whole.images])
            whole = Output(made, whole.nsfw_content_detected, whole.results)
        return whole if return_dict else (whole.images, whole.nsfw_content_detected)


@dataclass(frozen=True)
class _Seed:
    """Looks like a generator."""

    seed: int

    def initial_seed(self) -> int:
        return self.seed


class StableDiffusionImageVariationPipeline(_FromPictures):
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
        """``image``: one, or a list."""
        return self._each(
            image,
            [""],
            num_images_per_prompt,
            generator,
            output_type,
            return_dict,
            height=height,
            width=width,
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta or None,
            **others,
        )


class StableDiffusionImageEmbedPipeline(StableDiffusionImageVariationPipeline):
    """lambda-diffusers' name for it: ``pipe(4 * [image], guidance_scale=3.0)["sample"]``."""


class StableUnCLIPImg2ImgPipeline(_FromPictures):
    """Variations of a picture, with an optional prompt (SD 2.1 unCLIP)."""

    def __call__(
        self,
        image: Any,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        generator: Any = None,
        noise_level: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """``image``: one, or a list; the card's order of arguments."""
        return self._each(
            image,
            _listed(prompt or ""),
            num_images_per_prompt,
            generator,
            output_type,
            return_dict,
            height=height,
            width=width,
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            eta=eta or None,
            noise_level=noise_level,
            **others,
        )
