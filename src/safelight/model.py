"""A model: its spec, its networks, its tokenizer, on a device in a dtype.

Sources, in this order: a folder in the published layout, an original single file, the family
that ships inside the package, the local hub cache, and the network when it may be asked.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from safelight import cards, shipped
from safelight.checker import NO_CHECKER, Checker
from safelight.conditioning.prior import PriorModel
from safelight.diffusion.schedule import Schedule
from safelight.errors import InvalidRequest, ModelNotFound, WeightsError
from safelight.names import DEFAULT_MODEL
from safelight.nets.clip import TextTower, VisionTower
from safelight.nets.prior import Prior
from safelight.nets.tiny_decoder import TinyDecoder
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.parts import builders, load_tiny_decoder
from safelight.spec import ModelSpec
from safelight.store.checkers import read_checker
from safelight.store.weights import digest_of, load_into
from safelight.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from safelight.runtime import Prepared

log = logging.getLogger(__name__)


DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


PLANS = ("speed", "low-memory", "reference")

T = TypeVar("T")


class Cache(Generic[T]):
    """A small bounded map, least recently used out first; safe to share between threads."""

    def __init__(self, size: int = 256) -> None:
        self._size, self._lock = size, threading.Lock()
        self._items: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable) -> T | None:
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: Hashable, value: T) -> None:
        with self._lock:
            self._items[key] = value
            while len(self._items) > self._size:
                self._items.popitem(last=False)


@dataclass(eq=False)
class Model:
    """A loaded model. Its weights are shared by all who use it and never change."""

    spec: ModelSpec
    unet: UNet
    vae: VAE
    text: TextTower | None = None
    vision: VisionTower | None = None
    tokenizer: Tokenizer | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    source: str = "memory"
    digest: str = ""
    """SHA-256 over the weights' own digests; empty for a model made in memory."""
    notes: tuple[str, ...] = ()
    """What loading found worth telling: fallbacks, unofficial copies."""
    normaliser: tuple[Tensor, Tensor] | None = None
    """Mean and spread ``(1, D)`` of picture embeddings (unCLIP); None: 0 and 1."""
    prior: PriorModel | None = None
    """Picture embeddings from prompts (unCLIP with CLIP L)."""
    tiny_decoder: TinyDecoder | None = None
    """Latents to pictures at a fraction of the cost; its spec is ``spec.tiny_decoder``."""
    checker: Checker | None = None
    """Its safety checker: pictures are looked at before anybody sees them."""
    plan: str = "speed"
    """How it runs, one of :data:`PLANS`."""
    local_only: bool = False
    """Never ask the network for what is only fetched when it is needed (the depth estimator)."""
    text_cache: Cache[Tensor] = field(default_factory=Cache)
    picture_cache: Cache[Any] = field(default_factory=lambda: Cache(32))
    """What was read from pictures, by their digest."""

    def __post_init__(self) -> None:
        self.schedule = Schedule.from_spec(self.spec.schedule)
        for net in self.networks.values():
            net.requires_grad_(False).eval()
            if self.plan != "low-memory":
                net.to(self.device, self.dtype)
        if self.tiny_decoder is not None:
            self._fits(self.tiny_decoder)
        if self.plan == "low-memory":
            self._store()
        elif self.spec.vae.force_float32:
            self.vae.float()
        if self.prior is not None:
            self.prior.to(self.device, self.dtype)

    def _store(self) -> None:
        from safelight.runtime import stored

        for net in self.networks.values():
            # A tower in float32 is mapped from its file, and given back once it has been read.
            if net in (self.unet, self.vae) or next(net.parameters()).dtype != torch.float32:
                stored.store(net)

    def _fits(self, decoder: TinyDecoder) -> None:
        """Take a tiny decoder, which must read this model's latents."""
        own, vae = decoder.spec, self.spec.vae
        mine = (vae.latent_channels, vae.in_channels, vae.factor)
        if (own.latent_channels, own.out_channels, own.factor) != mine:
            raise InvalidRequest(
                "tiny_decoder",
                f"makes {own.out_channels} channels of {own.latent_channels}, {own.factor} times "
                f"larger; {self.spec.name} needs {mine[1]} of {mine[0]}, {mine[2]} times.",
            )
        decoder.requires_grad_(False).eval().to(self.device, self.dtype)
        self.spec = self.spec.replace(tiny_decoder=own)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that are there, by component name."""
        parts = {"unet": self.unet, "vae": self.vae, "text": self.text, "vision": self.vision}
        return {name: net for name, net in parts.items() if net is not None}

    @cached_property
    def runtime(self) -> Prepared:
        """The networks laid out for this machine, at first use: what the engine calls.

        Assign ``runtime.prepare(model, plan)`` for another plan than the machine's own.
        """
        from safelight.runtime import named, prepare

        return prepare(self, named(self, self.plan))

    @property
    def card(self) -> cards.Card | None:
        """Card and licence of the published model that these weights are, or come from; None for
        shipped ones and for shapes of one's own."""
        return None if self.source.startswith("shipped:") else cards.find(self.spec)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the layouts and fusions in use, for a picture's metadata."""
        return self.runtime.plan.kernels

    @classmethod
    def load(
        cls,
        name: str | Path = DEFAULT_MODEL,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        variant: str | None = None,
        local_only: bool | None = None,
        prior: str | Path | None = None,
        safety_checker: str | Path | None = None,
        plan: str | None = None,
        tiny_decoder: str | Path | None = None,
        **original: Any,
    ) -> Model:
        """Load a model by shipped name, folder, file or hub id.

        Args:
            device: default: CUDA where there is one, else MPS, else the CPU.
            dtype: ``float32``, ``float16`` or ``bfloat16``; default float32 on the CPU, float16
                on CUDA for full-size models, float32 for the tiny family.
            variant: ``fp16``, ``non_ema``: which of a folder's files to prefer.
            local_only: never ask the network; default: only when HF_HUB_OFFLINE says so.
            prior: a folder with a prior (Karlo's layout), to put in front of an unCLIP model that
                reads CLIP L's embeddings.
            safety_checker: a folder or a hub id, in place of the model's own or where it has
                none.
            plan: ``speed`` (default), ``low-memory``, which holds weights in float16 and takes
                about half the memory, or ``reference``, the networks as they are written.
            tiny_decoder: a file of weights in TAESD's layout, or a folder with one.
            original: how to read an original single file: ``ema``, ``prediction_type``,
                ``family``, ``layers``, ``tokenizer``, ``clip_stats`` of
                :func:`safelight.store.single_file.read_single_file`.

        Raises:
            ModelNotFound, WeightsError, InvalidRequest: with what to do about it.
        """
        original, plan = _original(original), pick_plan(plan, device, dtype)
        if safety_checker is not None:
            checker = Checker.load(safety_checker, local_only=local_only)
        else:
            checker = None
        model = cls._loaded(
            name,
            device,
            dtype,
            variant,
            local_only,
            prior,
            original,
            own_checker=checker is None,
            plan=plan,
        )
        model.local_only = bool(local_only)
        if tiny_decoder is not None:
            model.tiny_decoder = load_tiny_decoder(Path(tiny_decoder))
            model._fits(model.tiny_decoder)
        if checker is not None:
            model.checker = checker.to(model.device, model.dtype)
        found = (NO_CHECKER,) if model.checker is None else model.checker.notes
        model.notes = (*model.notes, *found)
        return model

    @classmethod
    def _loaded(
        cls,
        name: str | Path,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
        variant: str | None,
        local_only: bool | None,
        prior: str | Path | None,
        original: dict[str, Any],
        *,
        own_checker: bool,
        plan: str,
    ) -> Model:
        place = pick_device(device)
        pick_dtype(dtype, place, tiny=True)  # a wrong one must fail before anything is read
        told = (EMULATED,) if is_emulated(dtype, place) else ()
        member = shipped.find(name)
        if member is not None:
            if prior is not None:
                raise InvalidRequest("prior", f"{name} has no use for one.", "unclip-l has.")
            _only_for_single_files(name, original)
            made = pick_dtype(dtype, place, tiny=True)
            contents = shipped.read(member, made)
            return cls(
                spec=contents.spec,
                tokenizer=contents.tokenizer,
                device=place,
                dtype=made,
                source=f"shipped:{contents.spec.name}",
                digest=contents.digest,
                notes=told,
                normaliser=contents.normaliser,
                prior=contents.prior,
                plan=plan,
                **contents.nets,  # type: ignore[arg-type]
            )
        from safelight.store.folder import read_folder

        path, notes = Path(name), ()
        if not path.exists():
            from safelight.store.hub import resolve

            found = resolve(name, variant=variant, local_only=local_only)
            path, notes = Path(found.path), found.notes
        if path.is_dir():
            _only_for_single_files(name, original)
            contents = read_folder(path, variant=variant)
        else:
            from safelight.store.single_file import read_single_file

            contents = read_single_file(path, **original)
        notes = (*told, *notes)
        made = pick_dtype(dtype, place, tiny=False)
        ahead = _prior(contents.spec, path, variant, prior, made)
        model = _assemble(cls, contents, path, place, made, notes, prior=ahead, plan=plan)
        if own_checker and "safety_checker" in contents.tensors:
            model.checker = Checker.from_contents(read_checker(path, variant), place, model.dtype)
        if model.card is not None:
            _tell_licence(model.card.notice)
        return model


@cache
def _tell_licence(notice: str) -> None:
    """Once a process."""
    logging.getLogger("safelight.licence").warning(notice)


def load_tokenizer(
    name: str | Path = DEFAULT_MODEL, *, local_only: bool | None = None
) -> Tokenizer:
    """The tokenizer of a model, without its networks.

    Raises:
        ModelNotFound, WeightsError: as :meth:`Model.load`; a single file has none to give.
    """
    member = shipped.find(name)
    if member is not None:
        return shipped.tokenizer(member)
    path = Path(name)
    if not path.exists():
        from safelight.store.hub import resolve

        path = Path(resolve(name, local_only=local_only).path)
    if not (path / "tokenizer").is_dir():
        raise WeightsError(path, "holds no tokenizer folder.", "Name a folder or a hub id.")
    return Tokenizer.from_folder(path / "tokenizer")


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is."""
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise InvalidRequest("device", f"unknown device {device!r}.", "cpu, cuda or mps") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise _absent(place, "CUDA device")
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise _absent(place, "Apple GPU")
    return place


def _absent(place: torch.device, kind: str) -> InvalidRequest:
    problem = f"{place} was asked for, but this PyTorch finds no {kind}."
    return InvalidRequest("device", problem, "Use the device cpu (--device cpu).")


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device, *, tiny: bool) -> torch.dtype:
    """The dtype asked for, or the device's default; float32 for one that is only emulated."""
    if dtype is None:
        return torch.float16 if device.type == "cuda" and not tiny else torch.float32
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise InvalidRequest("dtype", f"unknown dtype {dtype!r}.", "float32, float16, bfloat16")
        dtype = DTYPES[dtype]
    return torch.float32 if is_emulated(dtype, device) else dtype


def pick_plan(
    plan: str | None, device: str | torch.device | None, dtype: str | torch.dtype | None
) -> str:
    """The plan asked for; ``speed`` for None.

    Raises:
        InvalidRequest: there is none of that name, or it has no meaning here.
    """
    plan = plan or "speed"
    if plan not in PLANS:
        raise InvalidRequest("plan", f"unknown plan {plan!r}.", ", ".join(PLANS))
    if plan == "low-memory":
        place = pick_device(device)
        if place.type != "cpu":
            raise InvalidRequest("plan", "low-memory is for the CPU.", "Use --dtype float16.")
        if pick_dtype(dtype, place, tiny=False) != torch.float32:
            raise InvalidRequest("plan", "low-memory computes in float32.", "Leave out --dtype.")
    return plan


EMULATED = "float16 on the CPU is emulated, slow and overflows: it runs in float32"


def is_emulated(dtype: str | torch.dtype | None, device: torch.device) -> bool:
    """Whether a dtype was asked for that this device only pretends to have."""
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    return device.type == "cpu" and wanted == torch.float16


def _assemble(
    cls: type[Model],
    contents: Any,
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    notes: Any,
    prior: PriorModel | None = None,
    *,
    plan: str,
) -> Model:
    spec: ModelSpec = contents.spec
    tokenizer = read_tokenizer(contents, path)  # before gigabytes are
    if prior is not None:
        spec = spec.replace(prior=prior.spec)
    nets: dict[str, nn.Module] = {}
    for part, build in builders(spec).items():
        with torch.device("meta"):
            net = build()
        load_into(net, contents.tensors[part], dtype=None if plan == "low-memory" else dtype)
        nets[part] = net
    return cls(
        spec=spec,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        source=str(path),
        digest=_folder_digest(contents),
        notes=(*notes, *contents.notes),
        normaliser=_normaliser(contents),
        prior=prior,
        plan=plan,
        **nets,  # type: ignore[arg-type]
    )


def _normaliser(contents: Any) -> tuple[Tensor, Tensor] | None:
    """The statistics of unCLIP's picture embeddings, where the model has some."""
    tensors = contents.tensors.get("image_normalizer")
    if tensors is None:
        return None
    missing = {"mean", "std"} - set(tensors.entries)
    if missing:
        raise WeightsError(tensors.file, f"lacks {' and '.join(sorted(missing))}.")
    mean, std = (tensors[name].float() for name in ("mean", "std"))
    if mean.shape != std.shape or bool((std <= 0).any()):
        raise WeightsError(tensors.file, "its mean and std are of no use.")
    return mean, std


def _prior(
    spec: ModelSpec,
    path: Path,
    variant: str | None,
    given: str | Path | None,
    dtype: torch.dtype,
) -> PriorModel | None:
    """The prior of a model's own folder, or the one that was given to it."""
    from safelight.store.prior import has_prior, read_prior

    folder = Path(given) if given is not None else path
    if given is None and (spec.family != "unclip" or not has_prior(folder)):
        return None
    if spec.family != "unclip":
        raise InvalidRequest("prior", f"{spec.name} has no use for one.", "unclip-l has.")
    if not has_prior(folder):
        raise WeightsError(folder, "holds no prior.", "Give a folder in Karlo's layout.")
    contents = read_prior(folder, variant)
    width, wanted = contents.spec.embedding_width, spec.unet.class_embedding_size // 2
    if width != wanted:
        raise WeightsError(
            folder,
            f"makes picture embeddings of {width} numbers but {spec.name} reads {wanted}: they "
            "are of different CLIPs.",
            "A CLIP-L prior (Karlo's) goes with unclip-l, not with unclip-h.",
        )
    with torch.device("meta"):
        net, text = Prior(contents.spec), TextTower(contents.spec.text)
    load_into(net, contents.net, dtype=dtype)
    load_into(text, contents.text, dtype=dtype)
    return PriorModel(contents.spec, net, text, Tokenizer.from_folder(contents.tokenizer))


def read_tokenizer(contents: Any, path: Path) -> Tokenizer | None:
    """A folder's own tokenizer; for a single file, one with its text tower's numbers."""
    place, text = contents.tokenizer, contents.spec.text
    if path.is_dir() or text is None:
        return None if place is None else Tokenizer.from_folder(place)
    if place is None:
        from safelight.store.single_file import no_tokenizer

        raise no_tokenizer(path)
    # Both families read the same words and differ in what they pad with.
    read = Tokenizer.from_folder if place.is_dir() else Tokenizer.from_bpe
    tokenizer = read(place, pad_id=text.pad_id)
    if tokenizer.vocab_size > text.vocab_size or tokenizer.eos_id != text.eos_id:
        raise InvalidRequest(
            "tokenizer",
            f"{place} has {tokenizer.vocab_size} tokens, but {path.name} reads {text.vocab_size}.",
            "Give --tokenizer FOLDER, the model's own.",
        )
    return tokenizer


_ORIGINAL = ("ema", "prediction_type", "family", "layers", "tokenizer", "clip_stats")


def _original(options: dict[str, Any]) -> dict[str, Any]:
    """Those that were given.

    Raises:
        InvalidRequest: one is unknown.
    """
    for name in options:
        if name not in _ORIGINAL:
            raise InvalidRequest(name, "is not an argument.", f"Known: {', '.join(_ORIGINAL)}.")
    return {name: value for name, value in options.items() if value is not None}


def _only_for_single_files(name: object, original: dict[str, Any]) -> None:
    for option in original:
        raise InvalidRequest(option, f"is for original single files, and {name} is none.")


def _folder_digest(contents: Any) -> str:
    """Of names, shapes and sizes: hashing gigabytes would cost more than a picture."""
    rows = [
        f"{part}/{name}:{tuple(entry.shape)}"
        for part, tensors in sorted(contents.tensors.items())
        for name, entry in sorted(tensors.entries.items())
    ]
    files = [
        f"{t.file}:{Path(t.file).stat().st_size}"
        for t in contents.tensors.values()
        if Path(t.file).is_file()
    ]
    return digest_of([Path(f).name for f in files] + rows)


def not_found(name: str) -> ModelNotFound:
    """The error for a name that nothing answers to."""
    return ModelNotFound(f"no model {name!r}. Shipped: {', '.join(shipped.names()) or 'none'}.")
