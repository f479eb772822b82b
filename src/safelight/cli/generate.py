"""``safelight generate``: pictures from a sentence."""

from __future__ import annotations

import logging
import re
import sys
import time
import urllib.request
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from safelight import __version__, names
from safelight.cli import adapters, naming, original, show
from safelight.cli import fast as fast_options
from safelight.errors import Cancelled, InvalidRequest, SafelightError
from safelight.inputs import MAX_BYTES
from safelight.names import DEFAULT_MODEL
from safelight.request import GenerateRequest, ImageResult, Outcome
from safelight.store import pictures

if TYPE_CHECKING:
    from PIL.Image import Image

    from safelight.generate import Generator
    from safelight.provenance import Signer


class Dtype(StrEnum):
    """Number formats of :data:`safelight.model.DTYPES`."""

    float32 = "float32"
    fp32 = "fp32"
    float16 = "float16"
    fp16 = "fp16"
    half = "half"
    bfloat16 = "bfloat16"
    bf16 = "bf16"


def command(
    words: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What the picture shows.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="The same, as an option.")
    ] = None,
    negative_prompt: Annotated[
        str, typer.Option("-n", "--negative-prompt", help="What it should not show.")
    ] = "",
    model: Annotated[
        str, typer.Option("-m", "--model", help="A shipped name, a folder, a file or a hub id.")
    ] = DEFAULT_MODEL,
    steps: Annotated[
        int | None,
        typer.Option("--steps", "--num-inference-steps", help="Sampling steps. [default: card's]"),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            "--guidance-scale",
            "--cfg-scale",
            "--scale",
            help="How strongly the prompt pulls; 1: no guidance. [default: card's]",
        ),
    ] = None,
    guidance_rescale: Annotated[
        float, typer.Option("--guidance-rescale", help="Against washed-out colours, 0 to 1.")
    ] = 0.0,
    fast: fast_options.Fast = None,
    guidance_interval: fast_options.Interval = None,
    guidance_until: fast_options.Until = None,
    freeze_context: fast_options.Freeze = False,
    block_cache: fast_options.Cache = None,
    block_cache_branch: fast_options.Branch = None,
    decoder: fast_options.Decoder = None,
    tiny_decoder: Annotated[
        Path | None, typer.Option("--tiny-decoder", help="A file in TAESD's layout, for any model.")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option("--sampler", "--sampling-method", help="In any program's spelling."),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", "--scheduler", help="Spacing of the steps.")
    ] = None,
    eta: Annotated[
        float | None, typer.Option("--eta", help="Fresh noise a step (ddim, euler-a), 0 to 1.")
    ] = None,
    width: Annotated[int | None, typer.Option("-W", "--width", help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option("-H", "--height", help="Pixels.")] = None,
    size: Annotated[str | None, typer.Option("--size", help="Both: 512x512, or 512.")] = None,
    seed: Annotated[
        int, typer.Option("-s", "--seed", help="Of the first picture; -1 draws one.")
    ] = -1,
    count: Annotated[
        int,
        typer.Option("--count", "-b", "--batch-size", "--batch-count", help="How many pictures."),
    ] = 1,
    n_iter: Annotated[int, typer.Option("--n-iter", help="Times --count.")] = 1,
    clip_skip: Annotated[
        int | None, typer.Option("--clip-skip", help="Text layers left out at the end.")
    ] = None,
    clip_stop: Annotated[
        int | None,
        typer.Option("--clip-stop-at-last-layers", help="The same, as A1111 counts: one more."),
    ] = None,
    weighting: Annotated[
        str,
        typer.Option("--prompt-dialect", "--weighting", help="none, a1111 or compel."),
    ] = "none",
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="FILE[:SCALE]", help="An adapter; may be repeated."),
    ] = None,
    lora_dir: Annotated[
        list[Path] | None,
        typer.Option("--lora-dir", help="A folder whose files --lora may name."),
    ] = None,
    embedding: Annotated[
        list[str] | None,
        typer.Option(
            "--embedding", metavar="FILE[:WORD]", help="A textual inversion; may be repeated."
        ),
    ] = None,
    embedding_dir: Annotated[
        list[Path] | None,
        typer.Option("--embedding-dir", help="A folder whose files --embedding may name."),
    ] = None,
    ema: original.Ema = None,
    prediction_type: original.Prediction = None,
    family: original.Family = None,
    layers: original.Layers = None,
    tokenizer: original.TokenizerPlace = None,
    clip_stats: original.ClipStats = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A file or a folder. [default: outputs]")
    ] = None,
    name_pattern: Annotated[
        str | None,
        typer.Option("--name-pattern", help="Names in a folder, as {number}-{seed}-{prompt}."),
    ] = None,
    picture_format: Annotated[
        str | None, typer.Option("--format", help="png, jpeg or webp. [default: png]")
    ] = None,
    metadata: Annotated[
        bool,
        typer.Option(
            "--metadata/--no-metadata",
            help="Settings in the file. The mark of machine-made pictures always stays.",
        ),
    ] = True,
    sign_key: Annotated[
        Path | None, typer.Option("--sign-key", help="Sign (C2PA) with this private key, PEM.")
    ] = None,
    sign_cert: Annotated[
        Path | None, typer.Option("--sign-cert", help="The key's certificate and chain, PEM.")
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also a sheet of all pictures.")] = False,
    preview: Annotated[
        int, typer.Option("--preview", help="A preview file every N steps; 0: none.")
    ] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps.")] = None,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="Of the networks.")] = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="About half the memory; a little slower.")
    ] = False,
    exact_reference: Annotated[
        bool, typer.Option("--exact-reference", help="The networks as they are written; slow.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Bit-equal pictures; one a network call.")
    ] = False,
    safety: Annotated[
        str | None,
        typer.Option("--safety", help="Flagged pictures: off, flag, blur, black or reject."),
    ] = None,
    safety_checker: Annotated[
        str | None,
        typer.Option("--safety-checker", help="A folder or a hub id, for any model."),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "-i", "--image", "--init-image", help="To start from: a path, - or an address."
        ),
    ] = None,
    mask: Annotated[
        str | None, typer.Option("--mask", help="White (or transparent) is repainted.")
    ] = None,
    mask_feather: Annotated[
        int, typer.Option("--mask-feather", help="Pixels that soften the mask's edge.")
    ] = 0,
    mask_crop: Annotated[
        int | None,
        typer.Option("--mask-crop", help="Repaint the mask's surroundings alone: pixels around."),
    ] = None,
    depth: Annotated[
        str | None, typer.Option("--depth", help="A depth map, larger is nearer.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength", "--denoising-strength", help="0 gives the image back, 1 forgets it."
        ),
    ] = None,
    strength_rule: Annotated[
        str, typer.Option("--strength-rule", help="How steps follow: exact, diffusers.")
    ] = "exact",
    noise_level: Annotated[
        int | None, typer.Option("--noise-level", help="Noise on the image (unCLIP, x4).")
    ] = None,
    prior: Annotated[
        Path | None, typer.Option("--prior", help="A prior's folder, in front of unclip-l.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Print nothing but where the pictures are.")
    ] = False,
) -> None:
    """Make pictures from a sentence, and from pictures where the model takes some.

    Picture k of seed s is the first picture of seed s + k. Ctrl-C ends within a step; finished
    pictures stay.
    """
    # All of this before torch is imported: a wrong argument fails at once.
    sentence = words if prompt is None else prompt
    if sentence is None and not image and depth is None:
        raise InvalidRequest("prompt", "is missing.", "Say what the picture shows.")
    if words is not None and prompt is not None:
        raise InvalidRequest("prompt", "is given twice.", "Give it once.")
    if size is not None:
        if width is not None or height is not None:
            raise InvalidRequest("size", "comes with a width or a height.", "Give one of them.")
        width, height = both_sides(size)
    if n_iter < 1:
        raise InvalidRequest("n-iter", f"must be at least 1, not {n_iter}.")
    skips = {"clip_skip": clip_skip, "clip_stop_at_last_layers": clip_stop}
    looked_at = looks(image, mask=mask, depth=depth)
    levers = fast_options.fields(
        *(fast, guidance_interval, guidance_until, freeze_context),
        *(block_cache, block_cache_branch, decoder),
    )
    request = GenerateRequest.from_kwargs(
        **({} if sentence is None else {"prompt": sentence}),
        **looked_at,
        **levers,
        mask_feather=mask_feather,
        mask_crop=mask_crop,
        strength=strength,
        strength_rule=strength_rule,
        noise_level=noise_level,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        sampler=sampler,
        schedule=schedule,
        eta=eta,
        width=width,
        height=height,
        seed=seed,
        count=count * n_iter,
        **{name: value for name, value in skips.items() if value is not None},
        weighting=weighting,
        loras=adapters.scaled(lora or ()),
        embeddings=adapters.worded(embedding or ()),
        deterministic=deterministic,
        preview_every=preview,
        safety=safety,
    )
    folders = adapters.folders(lora_dir, embedding_dir, request)
    places = naming.plan(output, picture_format, name_pattern)
    machine = {
        "device": device,
        "dtype": None if dtype is None else dtype.value,
        "prior": prior,
        "safety_checker": safety_checker,
        "plan": picked_plan(low_memory=low_memory, exact_reference=exact_reference),
        **({} if tiny_decoder is None else {"tiny_decoder": tiny_decoder}),
        **folders,
        **original.given(ema, prediction_type, family, layers, tokenizer, clip_stats),
    }
    saving = {"metadata": metadata, "signer": _signer(sign_key, sign_cert)}
    shoot(request, model, places, machine, saving, grid=grid, as_json=as_json, quiet=quiet)


def picked_plan(*, low_memory: bool, exact_reference: bool) -> str | None:
    """The plan that a command line's switches name; None for the default."""
    if low_memory and exact_reference:
        raise InvalidRequest("low-memory", "comes with --exact-reference.", "Give one of them.")
    return "low-memory" if low_memory else "reference" if exact_reference else None


def looks(images: list[str] | None, **others: str | None) -> dict[str, Any]:
    """The pictures of a command line, read: paths, ``-`` for standard input, http(s) addresses."""
    given = list(images or []) + [each for each in others.values() if each is not None]
    if given.count("-") > 1:
        raise InvalidRequest("image", "standard input holds one picture.", "Give - once.")
    found: dict[str, Any] = {}
    if images:
        read = [fetched(each, "image") for each in images]
        found = {"image": read[0]} if len(read) == 1 else {"images": read}
    return found | {name: fetched(each, name) for name, each in others.items() if each is not None}


def fetched(place: str, field: str) -> bytes | str:
    """A picture's bytes from standard input or an address; a path as it is.

    Raises:
        InvalidRequest: nothing is there, or it is larger than a picture may be.
    """
    if place == "-":
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
    elif re.match(r"https?://", place, re.IGNORECASE):
        request = urllib.request.Request(place, headers={"User-Agent": f"safelight/{__version__}"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                data = answer.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            raise InvalidRequest(field, f"{place} cannot be fetched: {error}.") from None
    else:
        return place
    if not data:
        raise InvalidRequest(field, f"{place} holds nothing.")
    if len(data) > MAX_BYTES:
        raise InvalidRequest(field, f"{place} has more than {MAX_BYTES // 2**20} MiB.")
    return data


def shoot(
    request: GenerateRequest,
    model: str,
    places: naming.Naming,
    machine: Mapping[str, Any],
    saving: dict[str, Any] | None = None,
    *,
    grid: bool = False,
    as_json: bool = False,
    quiet: bool = False,
) -> None:
    """Load a model, make a request's pictures, and tell about them.

    Args:
        machine: ``device`` and ``dtype``, and further options of :func:`safelight.generate.load`.
        saving: further arguments of :func:`safelight.provenance.save`; None: the settings are kept
            and nothing is signed.
    """
    device = machine.get("device")
    if device is not None and not re.fullmatch(r"(cpu|mps|cuda)(:\d+)?", device):
        raise InvalidRequest("device", f"{device!r} is unknown.", "One of cpu, cuda, mps.")
    if not model.strip():
        raise InvalidRequest("model", "is empty.", "See safelight models.")

    say = show.words()
    say.quiet = quiet or as_json
    logging.getLogger("safelight.licence").disabled = say.quiet
    began = time.monotonic()
    with say.status(f"loading {model} …"):
        from safelight.generate import load

        if request.deterministic:
            steady()
        generator = load(fast_options.model_for(model, request.fast), **machine)
        (request,) = generator.requests(request=request)
    for note in generator.model.notes:
        say.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    say.print(_settings(request, generator), style="dim", markup=False, soft_wrap=True)
    made = _Shoot(generator, request, places, say.quiet, saving or {})
    made.run(keep=grid)
    if grid:
        made.sheet()
    if as_json:
        show.document(made.report(time.monotonic() - began))
    else:
        made.tell(quiet)
    made.leave()


def both_sides(text: str) -> tuple[int, int]:
    """Width and height of ``--size``."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*(?:[xX*×,]\s*(\d{1,9})\s*)?", text)
    if match is None:
        raise InvalidRequest("size", f"{text!r} is not a size.", "Write 512x512, or 512.")
    return int(match[1]), int(match[2] or match[1])


def _signer(key: Path | None, certificates: Path | None) -> Signer | None:
    if key is None and certificates is None:
        return None
    if key is None or certificates is None:
        lacks = "sign-key" if key is None else "sign-cert"
        raise InvalidRequest(lacks, "is missing.", "Give --sign-key and --sign-cert.")
    from safelight.provenance import Signer

    return Signer.from_files(key, certificates)


def steady() -> None:
    """The process-wide part of ``--deterministic``, which only a command may set."""
    import torch

    if torch.cuda.is_available():  # on the CPU nothing here is random, and asking is slow
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


def _settings(request: GenerateRequest, generator: Generator) -> str:
    model = generator.model
    parts = [
        model.spec.name,
        f"seed {request.seed}",
        f"{request.steps} steps",
        names.sampler_label(request.sampler or ""),
        f"schedule {request.schedule or 'automatic'}",
        f"guidance {request.guidance_scale:g}",
        f"{request.width}x{request.height}",
        f"{model.device} {str(model.dtype).removeprefix('torch.')}",
    ]
    if request.strength is not None:
        parts.append(f"strength {request.strength:g}")
    if request.noise_level is not None:
        parts.append(f"noise level {request.noise_level}")
    for name in ("guidance_until", "block_cache", "decoder"):
        if getattr(request, name) is not None:
            parts.append(f"{name.replace('_', ' ')} {getattr(request, name)}")
    if request.count > 1:
        parts.insert(2, f"{request.count} pictures")
    return " · ".join(parts)


class _Shoot:
    """One call: its pictures, their files, and what to say about them."""

    def __init__(
        self,
        generator: Generator,
        request: GenerateRequest,
        places: naming.Naming,
        quiet: bool,
        saving: dict[str, Any],
    ) -> None:
        from safelight.generate import Cancel

        self.saving = saving

        self.generator, self.request, self.places = generator, request, places
        self.quiet = quiet
        self.cancel = Cancel()
        self.results: list[ImageResult] = []
        self.paths: dict[int, Path] = {}
        self.grid: Path | None = None
        self._previews: dict[int, Path] = {}

    def run(self, *, keep: bool) -> None:
        """Make the pictures, and write each as soon as it is finished.

        Args:
            keep: the pictures in memory too, for a sheet.
        """
        from safelight.generate import Preview

        unsaved: ImageResult | None = None
        with show.bar(quiet=self.quiet) as bar:
            task = bar.add_task("steps", total=None)
            events = self.generator.stream(request=self.request, cancel=self.cancel)
            while True:
                try:
                    if unsaved is not None:
                        self._keep(unsaved)
                        unsaved = None
                    event = next(events, None)
                    if event is None:
                        break
                    if isinstance(event, ImageResult):
                        unsaved = event
                    elif isinstance(event, Preview):
                        self._show(event.image, event.picture)
                    else:
                        total = event.total * self.request.count
                        bar.update(task, total=total, completed=round(event.done * total))
                except KeyboardInterrupt:
                    if self.cancel.is_set:  # the second one means it
                        raise
                    self.cancel.set()
                if not keep and self.results:
                    self.results[-1] = self.results[-1].replace(image=None)
        self.results.sort(key=lambda result: result.index)

    def _keep(self, result: ImageResult) -> None:
        from safelight import provenance

        if result.image is not None and result.index not in self.paths:
            path = self._path(result)
            provenance.save(result, path, **self.saving)
            self.paths[result.index] = path
        if all(known.index != result.index for known in self.results):
            self.results.append(result)
        if result.index in self._previews:
            self._previews.pop(result.index).unlink(missing_ok=True)

    def _path(self, result: ImageResult) -> Path:
        request = result.request
        fields = {
            "seed": result.seed,
            "prompt": request.prompt,
            "model": self.generator.model.spec.name,
            "sampler": request.sampler,
            "steps": request.steps,
            "scale": f"{request.guidance_scale:g}",
            "width": request.width,
            "height": request.height,
        }
        return self.places.path(fields, alone=self.request.count == 1)

    def _show(self, image: Image, index: int) -> None:
        seed = (self.request.seed or 0) + index
        path = self._previews.setdefault(index, self.places.folder / f"preview-{seed}.png")
        pictures.save(path, image)  # whoever watches the file never sees half of it

    def sheet(self) -> None:
        """All pictures on one, as near to a square as it goes."""
        from PIL import Image

        images = [r.image for r in self.results if r.image is not None]
        if not images:
            return
        columns = next(n for n in range(1, len(images) + 1) if n * n >= len(images))
        width, height = images[0].size
        sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
        for k, image in enumerate(images):
            sheet.paste(image, (k % columns * width, k // columns * height))
        self.grid = self.places.beside(next(iter(self.paths.values())), "grid")
        pictures.save(self.grid, sheet)

    def report(self, seconds: float) -> dict[str, Any]:
        """The document of ``--json``."""
        model = self.generator.model
        return {
            "schema": 1,
            "model": {"name": model.spec.name, "digest": model.digest, "notes": list(model.notes)},
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "seconds": round(seconds, 3),
            "request": self.request.model_dump(mode="json"),
            "grid": self.grid,
            "pictures": [
                {
                    "path": self.paths.get(result.index),
                    "seed": result.seed,
                    "outcome": result.outcome,
                    "message": result.message,
                    "nsfw": result.nsfw,
                    "notices": list(result.notices),
                    "metadata": dict(result.metadata),
                }
                for result in self.results
            ],
        }

    def tell(self, quiet: bool) -> None:
        """Notices on stderr, where the pictures are on stdout."""
        say = show.words()
        for notice in dict.fromkeys(n for r in self.results for n in r.notices):
            if not quiet:
                say.print(Text(f"note: {notice}", style="yellow"), soft_wrap=True)
        for result in self.results:
            if result.outcome not in (Outcome.ok, Outcome.cancelled):
                line = f"seed {result.seed}: {result.outcome}: {result.message}"
                say.print(Text(line, style="red"), soft_wrap=True)
        for path in [*(self.paths[k] for k in sorted(self.paths)), self.grid]:
            if path is not None:
                typer.echo(path)

    def leave(self) -> None:
        """The exit code: cancelled, failed, or done."""
        total, finished = self.request.count, len(self.paths)
        if any(result.outcome == Outcome.cancelled for result in self.results):
            raise Cancelled(f"cancelled: {finished} of {total} pictures are finished.")
        if finished < total:
            raise SafelightError(f"{finished} of {total} pictures are finished.")
