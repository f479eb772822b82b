"""Adapters on a model: LoRA and textual inversion, for one request and no longer.

A model's weights are shared by all who use it and never change. So a request's adapters make a
*derived* model: it shares every tensor with the first one but those that an adapter changes, each
of which is the original plus the adapters' sum, rounded once. Nothing is ever unmerged, so nothing
drifts. Few derived models are kept, because at full size one costs about as much as a UNet.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safelight.errors import InvalidRequest, WeightsError
from safelight.model import Cache, Model
from safelight.nets import lora, lora_keys
from safelight.nets.clip import TextTower
from safelight.request import GenerateRequest
from safelight.runtime import choose, prepare
from safelight.store.adapter_files import read_embedding_file, read_lora_file
from safelight.store.keymaps import unet_rows
from safelight.store.registry import Registry
from safelight.store.weights import Entry, sha256

log = logging.getLogger(__name__)

_SMALL = 2**28
"""Bytes of a UNet of which several adapted copies may be kept."""
_LISTED = 8
_COPYING = ("packed", "transposed")
"""Switches of a plan that lay weights out anew."""


@dataclass(frozen=True, eq=False)
class LoRA:
    """A LoRA file, read for one model.

    Attributes:
        name: the file's, without folder and ending.
        sha256: of the file.
        adapters: by component, ``unet`` and ``text_encoder``.
        matched: keys of the file that belong to a layer of the model.
        unmatched: the others.
    """

    name: str
    sha256: str
    adapters: Mapping[str, lora.Adapter]
    matched: int
    unmatched: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """What to tell about keys that found no layer; empty where all did."""
        if not self.unmatched:
            return ""
        listed = ", ".join(self.unmatched[:_LISTED]) + " …" * (len(self.unmatched) > _LISTED)
        total = self.matched + len(self.unmatched)
        return (
            f"LoRA {self.name}: {len(self.unmatched)} of {total} keys belong to no layer of this "
            f"model: {listed}"
        )


@dataclass(frozen=True, eq=False)
class Embedding:
    """A textual inversion, read for one model: words, each with its vectors ``(n, width)``."""

    name: str
    sha256: str
    words: Mapping[str, Entry]


@dataclass(frozen=True, eq=False)
class Adaptation:
    """What a request adds to a model: read and checked, not yet done.

    Attributes:
        loras: with their scales, in the request's order.
        embeddings: in the request's order.
    """

    loras: tuple[tuple[LoRA, float], ...] = ()
    embeddings: tuple[Embedding, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for what changes a model equally."""
        loras = tuple((each.sha256, scale) for each, scale in self.loras)
        return loras, tuple((each.sha256, *each.words) for each in self.embeddings)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the caller should know."""
        return tuple(each.note for each, _ in self.loras if each.note)

    @property
    def record(self) -> list[dict[str, Any]]:
        """For a picture's metadata: names and digests, no folders."""
        return [
            *(
                {"kind": "lora", "name": each.name, "sha256": each.sha256, "scale": scale}
                for each, scale in self.loras
            ),
            *(
                {"kind": "embedding", "name": e.name, "sha256": e.sha256, "words": [*e.words]}
                for e in self.embeddings
            ),
        ]


NOTHING = Adaptation()


def read_lora(model: Model, path: str | Path) -> LoRA:
    """Read a LoRA for a model: kohya's, PEFT's or one of diffusers' older layouts.

    Raises:
        WeightsError: broken, of another kind, no key belongs to a layer of the model, or its
            shapes are another model's.
    """
    path = Path(path)
    state, metadata = read_lora_file(path)
    networks: dict[str, nn.Module] = {"unet": model.unet}
    if model.text is not None:
        networks["text_encoder"] = model.text
    unmatched: list[str] = []
    adapters = lora_keys.read(
        state,
        networks,
        metadata=metadata,
        originals={"unet": unet_rows(model.spec.unet)},
        source=path,
        unmatched=unmatched,
    )
    found = LoRA(
        name=_name(path),
        sha256=sha256(path),
        adapters=adapters,
        matched=len(state) - len(unmatched),
        unmatched=tuple(unmatched),
    )
    log.info("%s: %d keys matched, %d did not", path, found.matched, len(unmatched))
    return found


def read_embedding(model: Model, path: str | Path, word: str = "") -> Embedding:
    """Read a textual inversion for a model.

    Args:
        word: the word for it in prompts; empty for the file's own.

    Raises:
        WeightsError: it is none, or was made for another text encoder.
        InvalidRequest: the model reads no text.
    """
    path = Path(path)
    if model.text is None or model.tokenizer is None:
        raise InvalidRequest("embeddings", f"{model.spec.name} does not read text.")
    words = read_embedding_file(path, word or None)
    for name, entry in words.items():
        if entry.shape[1] != model.text.spec.width:
            raise WeightsError(
                path,
                f"{name} is {entry.shape[1]} wide, but {model.spec.name} reads words "
                f"{model.text.spec.width} wide.",
                "It was made for another model.",
            )
        if name in model.tokenizer.vocab or f"{name}</w>" in model.tokenizer.vocab:
            raise WeightsError(
                path, f"{name!r} is a word of the model's already.", f"Say another: {path}:WORD."
            )
    return Embedding(_name(path), sha256(path), words)


class Adapters:
    """A model's adapters. Safe to share between threads.

    Args:
        model: never changed.
        loras: where names of LoRAs are looked up.
        embeddings: the same for textual inversions.
    """

    def __init__(
        self, model: Model, loras: Registry | None = None, embeddings: Registry | None = None
    ) -> None:
        self.base = model
        self.loras = loras or Registry()
        self.embeddings = embeddings or Registry(kind="embedding", option="--embedding-dir")
        self._files: Cache[Any] = Cache(16)
        self._models: Cache[Model] = Cache(8 if _bytes(model.unet) <= _SMALL else 1)
        self._lock = threading.Lock()

    def plan(self, request: GenerateRequest) -> Adaptation:
        """Read what a request names. Cheap the second time.

        Raises:
            InvalidRequest: no such name (the message lists the known ones), or two textual
                inversions of one word.
            WeightsError: a file is broken, or of another model.
        """
        if not request.loras and not request.embeddings:
            return NOTHING
        loras = []
        for name, scale in request.loras:
            path = self.loras.find(name, "loras")
            loras.append((self._read(path, lambda p=path: read_lora(self.base, p)), scale))
        embeddings: list[Embedding] = []
        for name, word in request.embeddings:
            path = self.embeddings.find(name, "embeddings")
            found = self._read(path, lambda p=path, w=word: read_embedding(self.base, p, w), word)
            known = {w for each in embeddings for w in each.words}
            if twice := known & set(found.words):
                raise InvalidRequest(
                    "embeddings", f"{', '.join(twice)} comes twice.", f"Say {name}:ANOTHER."
                )
            embeddings.append(found)
        return Adaptation(tuple(loras), tuple(embeddings))

    def reader(self, adaptation: Adaptation) -> Model:
        """The base model with the adaptation's words, but none of its weights: for counting."""
        return _worded(self.base, adaptation) if adaptation.embeddings else self.base

    def model(self, adaptation: Adaptation) -> Model:
        """The base model with the adaptation in its weights; the base itself for none."""
        if not adaptation.loras and not adaptation.embeddings:
            return self.base
        with self._lock:
            found = self._models.get(adaptation.key)
            if found is None:
                found = adapt(self.base, adaptation)
                self._models.put(adaptation.key, found)
            return found

    def public(self, request: GenerateRequest) -> GenerateRequest:
        """The request as a picture may carry it: adapters by name, without anybody's folders."""
        if not request.loras and not request.embeddings:
            return request
        return request.replace(
            loras=tuple((_name(Path(name)), scale) for name, scale in request.loras),
            embeddings=tuple((_name(Path(name)), word) for name, word in request.embeddings),
        )

    def _read(self, path: Path, read: Any, *more: str) -> Any:
        stat = path.stat()
        key = (str(path.absolute()), stat.st_mtime_ns, stat.st_size, *more)
        found = self._files.get(key)
        if found is None:
            found = read()
            self._files.put(key, found)
        return found


def adapt(model: Model, adaptation: Adaptation) -> Model:
    """A second model with the adaptation in its weights; every other tensor is shared."""
    changes: dict[str, Any] = {}
    with torch.no_grad():
        for component, part in (("unet", "unet"), ("text_encoder", "text")):
            network = model.networks.get(part)
            uses = [
                (each.adapters[component].to(model.device), scale)
                for each, scale in adaptation.loras
                if component in each.adapters and scale
            ]
            if network is not None and uses:
                changes[part] = lora.merge(network, uses)
        if adaptation.embeddings:
            model = _worded(model, adaptation)
            tower = changes.get("text", model.text)
            changes["text"] = _lengthened(tower, adaptation.embeddings)
    twin = derive(model, **changes)
    if "unet" not in changes:
        twin.runtime = model.runtime  # so that its pictures share network calls with others
    else:
        plan = model.runtime.plan
        if plan.fused:
            fits = choose(twin, others=1)  # the same layouts, as far as there is memory for two
            both = {name: getattr(plan, name) and getattr(fits, name) for name in _COPYING}
            plan = dataclasses.replace(plan, **both, kept=min(plan.kept, fits.kept))
        twin.runtime = prepare(twin, plan, like=model.runtime)
    return twin


def derive(model: Model, **changes: Any) -> Model:
    """A second model with other parts. What is remembered of the first one's prompts is not."""
    twin = copy.copy(model)  # not dataclasses.replace, which would convert shared networks again
    for name in list(vars(twin)):
        if isinstance(getattr(type(model), name, None), cached_property):
            del vars(twin)[name]
    for each in fields(twin):
        cache = getattr(twin, each.name)
        if isinstance(cache, Cache):
            setattr(twin, each.name, Cache(cache._size))
    for name, value in changes.items():
        setattr(twin, name, value)
    return twin


def _worded(model: Model, adaptation: Adaptation) -> Model:
    """The model with a tokenizer that knows the new words; their rows follow the table's last."""
    assert model.tokenizer is not None
    assert model.text is not None
    at, rows = _table(model.text).shape[0], {}
    for word, entry in _all_words(adaptation.embeddings):
        rows[word] = list(range(at, at + entry.shape[0]))
        at += entry.shape[0]
    spec = model.spec
    if spec.words:  # or a model of few words would say that it has never heard of these
        new = re.findall(r"[a-z]+", " ".join(rows).lower())
        spec = spec.replace(words=tuple(sorted({*spec.words, *new})))
    twin = derive(model, tokenizer=model.tokenizer.with_words(rows), spec=spec)
    twin.runtime = model.runtime
    return twin


def _lengthened(tower: TextTower, embeddings: Iterable[Embedding]) -> TextTower:
    """A tower whose table has the new words' vectors behind its own."""
    table = _table(tower)
    if table.dtype == torch.float16:  # only held so; see safelight.runtime.stored
        table = table.float()
    new = [entry.read().to(table.device, table.dtype) for _, entry in _all_words(embeddings)]
    twin = lora.view(tower)
    assert isinstance(twin, TextTower)
    longer = nn.Embedding.from_pretrained(torch.cat([table, *new]))
    twin.text_model.embeddings.token_embedding = longer
    return twin


def _table(tower: TextTower) -> torch.Tensor:
    return tower.text_model.embeddings.token_embedding.weight


def _all_words(embeddings: Iterable[Embedding]) -> list[tuple[str, Entry]]:
    return [pair for each in embeddings for pair in each.words.items()]


def _name(path: Path) -> str:
    """What people call a file: its folder's name where its own is the same in all of them."""
    generic = path.stem in ("pytorch_lora_weights", "adapter_model", "learned_embeds")
    return path.parent.name if generic and path.parent.name else path.stem


def _bytes(net: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in net.parameters())
