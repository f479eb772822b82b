"""What the cards' pipelines share: loading, moving, schedulers, seeds, results."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safelight.compat.pictures import Row
from safelight.compat.schedulers import Scheduler, read
from safelight.errors import InvalidRequest, SafelightError, VariantNotFound
from safelight.request import ALIASES, MAX_SEED, GenerateRequest

if TYPE_CHECKING:
    from PIL.Image import Image

    from safelight.generate import Generator
    from safelight.request import ImageResult

log = logging.getLogger(__name__)

_IGNORED = (
    *("use_safetensors", "low_cpu_mem_usage", "device_map", "cache_dir", "token"),
    "use_auth_token",
)
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
    """A model behind a face, loaded at first use."""

    def __init__(self, name: str | Path, **options: Any) -> None:
        self._name, self._options = name, options
        self._generator: Generator | None = None
        self._scheduler: Scheduler | None = None
        self._unchecked = False
        self._slip: str | None = None

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
        scheduler: Any = None,
        **options: Any,
    ) -> Self:
        """A model by name, folder, file or hub id. It is loaded when it is first needed, so
        that ``.to("cuda")`` in the next line costs nothing.

        Args:
            variation: the unCLIP card's slip for ``variant``, which diffusers does not read: that
                variant where there is one, else the plain weights.
            revision: a hub branch; ``fp16``, as old code says, means that variant. A folder has
                none.
            scheduler: as for :attr:`scheduler`.

        Raises:
            InvalidRequest: an unknown argument.
        """
        if revision in ("fp16", "non_ema"):
            variant, revision = variant or revision, None
        if revision is not None and "@" not in str(name) and not Path(name).exists():
            name = f"{name}@{revision}"
        unknown = [key for key in options if key not in _IGNORED]
        for key in ("safety_checker", "feature_extractor", "requires_safety_checker"):
            if key in unknown and not options[key]:
                unknown.remove(key)
        if unknown:
            raise InvalidRequest(unknown[0], "is not supported by this face.", "See safelight.load")
        arguments: dict[str, Any] = {
            "dtype": torch_dtype,
            "variant": variant,
            "local_only": local_files_only,
        }
        pipe = cls(name, **{key: value for key, value in arguments.items() if value is not None})
        pipe._unchecked = "safety_checker" in options and options["safety_checker"] is None
        pipe._slip = None if variant else variation
        if scheduler is not None:
            pipe.scheduler = scheduler
        return pipe

    def to(self, *places: Any, **named: Any) -> Self:
        """To a device, a dtype or both, as ``torch.nn.Module.to`` takes them. A device that this
        machine lacks is an :class:`~safelight.errors.InvalidRequest` when the model is loaded."""
        import torch

        for place in (*places, *named.values()):
            if place is None or isinstance(place, bool):
                continue
            key = "dtype" if isinstance(place, torch.dtype) else "device"
            if self._options.get(key) != place:
                self._options[key], self._generator = place, None
        return self

    @property
    def model(self) -> Generator:
        """What runs behind this face, loaded at first use."""
        if self._generator is None:
            self._generator = self._loaded()
            from safelight.model import EMULATED

            if EMULATED in self._generator.model.notes:
                log.warning(EMULATED)
        return self._generator

    def _loaded(self) -> Generator:
        from safelight.generate import load

        if self._slip is not None:
            try:
                return load(self._name, variant=self._slip, **self._options)
            except VariantNotFound as error:
                log.warning("%s Using the plain weights.", error.problem)
        return load(self._name, **self._options)

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

    @property
    def safety_checker(self) -> Any:
        """The checker in use, or None; assign None to switch it off."""
        return None if self._unchecked else self.model.model.checker

    @safety_checker.setter
    def safety_checker(self, checker: Any) -> None:
        if checker is not None:
            fix = "Another one: safelight.load(..., safety_checker=FOLDER)."
            raise InvalidRequest("safety_checker", "can only be None here.", fix)
        self._unchecked = True

    def set_progress_bar_config(self, **_: Any) -> None:
        """Nothing: no bar is printed. ``safelight.load(...).stream`` tells progress."""

    def enable_attention_slicing(self, *_: Any) -> None:
        """Nothing: attention is never materialised."""

    def enable_xformers_memory_efficient_attention(self, *_: Any) -> None:
        """Nothing: attention is never materialised."""

    def _run(
        self,
        columns: dict[str, list[Row]],
        others: dict[str, Any],
        *,
        num_images_per_prompt: int,
        generator: Any,
        output_type: str,
        return_dict: bool,
        **arguments: Any,
    ) -> Any:
        """Every picture is a request with a seed of its own; they share network calls.

        Args:
            columns: by the argument they come from, what differs from picture to picture: one
                entry a picture, or one for all.
            others: further fields of a request, in any spelling.
            arguments: what pictures have in common; None is the card's.
        """
        if output_type not in ("pil", "np"):
            raise InvalidRequest("output_type", f"{output_type!r} is not supported.", "pil or np.")
        if num_images_per_prompt < 1:
            raise InvalidRequest("num_images_per_prompt", "must be at least 1.")
        for name in others:
            if ALIASES.get(name, name) == "count":
                raise InvalidRequest(name, "means the same as num_images_per_prompt.", "Give one.")
        arguments |= others
        rows = [row for row in _rows(columns) for _ in range(num_images_per_prompt)]
        seeds = _seeds(generator, arguments.pop("seed", None), len(rows))
        chosen = self._scheduler
        if chosen is not None and chosen.sampler is not None:
            arguments["sampler"] = chosen.sampler
            arguments["schedule"] = arguments.get("schedule") or chosen.spacing
            arguments["sampler_options"] = {**chosen.options, **others.get("sampler_options", {})}
        if self._unchecked:
            arguments.setdefault("safety", "off")
        shared = {key: value for key, value in arguments.items() if value is not None}
        requests = [
            GenerateRequest.from_kwargs(**{**row, **shared}, seed=seed)
            for row, seed in zip(rows, seeds, strict=True)
        ]
        output = _output(self.model.generate(request=requests))
        if output_type == "np":
            import numpy as np

            made: Any = np.stack([np.asarray(p, np.float32) / 255 for p in output.images])
            output = replace(output, images=made)
        return output if return_dict else self._tuple(output)

    def _tuple(self, output: Output) -> tuple[Any, ...]:
        return output.images, output.nsfw_content_detected


def _rows(columns: dict[str, list[Row]]) -> list[Row]:
    """Columns side by side; one entry alone goes with all of the others."""
    longest = max(columns, key=lambda name: len(columns[name]))
    count = len(columns[longest])
    for name, entries in columns.items():
        if len(entries) not in (1, count):
            problem = f"{len(entries)} for {count} in {longest}."
            raise InvalidRequest(name, problem, "Give one for all, or one each.")
    return [
        {
            key: value
            for column in columns.values()
            for key, value in column[k % len(column)].items()
        }
        for k in range(count)
    ]


def _seeds(generator: Any, seed: int | None, count: int) -> list[int]:
    """Seeds of pictures: of one torch generator each, or numbered through from one."""
    if isinstance(generator, Sequence):
        if len(generator) != count:
            problem = f"{len(generator)} generators for {count} pictures."
            raise InvalidRequest("generator", problem)
        return [_seed(each) for each in generator]
    if generator is not None:
        seed = _seed(generator)
    if seed is None or seed == -1:
        seed = secrets.randbelow(2**32)
    return [(seed + k) % (MAX_SEED + 1) for k in range(count)]


def _seed(generator: Any) -> int:
    """Its own seed; where it has been drawn from before, here or elsewhere, a number from it.

    It goes on by one draw, so that a generator used again gives other pictures.
    """
    import torch

    first = generator.initial_seed()
    fresh = torch.Generator(generator.device).manual_seed(first)
    new = torch.equal(generator.get_state(), fresh.get_state())
    drawn = torch.randint(2**32, (1,), generator=generator, device=generator.device)
    return first % (MAX_SEED + 1) if new else int(drawn)


def _output(results: list[ImageResult]) -> Output:
    images: list[Image] = []
    for result in results:
        if result.image is None:
            raise SafelightError(f"no picture for seed {result.seed}: {result.message}")
        images.append(result.image)
    seen = [result.nsfw for result in results]  # None where nobody looked: never false
    return Output(images, None if None in seen else [bool(nsfw) for nsfw in seen], results)
