"""The family that ships inside the package.

A member is a folder of ``safelight/family`` with a ``model.json``: its spec, and for each file its
place in the family and its SHA-256. What members share (towers, tokenizer, autoencoder) lies there
once. A safety checker is a folder with a ``checker.json`` instead, and shares the vision tower.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from safelight.conditioning.prior import PriorModel
from safelight.errors import WeightsError
from safelight.nets.clip import TextTower
from safelight.nets.prior import Prior
from safelight.nets.safety_head import SafetyHead
from safelight.nets.tiny_decoder import TinyDecoder
from safelight.parts import builders
from safelight.spec import ModelSpec, SafetySpec
from safelight.store.weights import StateDict, digest_of, load_into, read_weights, sha256
from safelight.text.tokenizer import Tokenizer

FAMILY = Path(__file__).parent / "family"
"""Where the members lie."""

Net = TypeVar("Net", bound=nn.Module)
_AGAIN = "Install Safelight again."


class Shipped(NamedTuple):
    """A member, read."""

    spec: ModelSpec
    nets: dict[str, nn.Module]
    """By component name."""
    tokenizer: Tokenizer
    digest: str
    """Over the files' own digests."""
    normaliser: tuple[Tensor, Tensor] | None
    prior: PriorModel | None


def names() -> list[str]:
    """Of the models."""
    return sorted(file.parent.name for file in FAMILY.glob("*/model.json"))


def checkers() -> list[str]:
    """Names of the safety checkers."""
    return sorted(file.parent.name for file in FAMILY.glob("*/checker.json"))


def find(name: str | Path) -> Path | None:
    """A member's ``model.json``, or None."""
    file = FAMILY / str(name) / "model.json"
    return file if file.is_file() else None


def student(name: str | Path) -> str:
    """The shipped model of few steps that was distilled from a shipped one; empty: there is none.

    Raises:
        WeightsError: it is named, but is not there.
    """
    member = find(name)
    if member is None:
        return ""
    spec, _ = _record(member, ModelSpec.model_validate)
    if spec.student and find(spec.student) is None:
        raise WeightsError(FAMILY / spec.student, f"the student of {name}, is missing.", _AGAIN)
    return spec.student


def tokenizer(member: Path) -> Tokenizer:
    """A member's, without its networks."""
    _, files = _record(member, ModelSpec.model_validate)
    return Tokenizer.from_folder(FAMILY / files["tokenizer"]["path"])


def read(member: Path, dtype: torch.dtype) -> Shipped:
    """Read a member.

    Args:
        member: of :func:`find`.

    Raises:
        WeightsError: a file is missing, or is not the one that was shipped.
    """
    spec, files = _record(member, ModelSpec.model_validate)
    nets = {part: _built(build, files[part], dtype) for part, build in builders(spec).items()}
    tokens = Tokenizer.from_folder(FAMILY / files["tokenizer"]["path"])
    normaliser = prior = None
    if "image_normalizer" in files:
        spread = _checked(files["image_normalizer"])
        normaliser = (spread["mean"].float(), spread["std"].float())
    if spec.prior is not None:
        wanted, text = spec.prior, nets["text"]
        assert isinstance(text, TextTower)
        net = _built(lambda: Prior(wanted), files["prior"], dtype)
        prior = PriorModel(wanted, net, text, tokens)
    return Shipped(spec, nets, tokens, _digest(files), normaliser, prior)


def read_checker(name: str | Path) -> tuple[SafetySpec, SafetyHead, str] | None:
    """A shipped safety checker with its digest, in float32; None where the name is no checker's.

    Raises:
        WeightsError: as for :func:`read`.
    """
    file = FAMILY / str(name) / "checker.json"
    if not file.is_file():
        return None
    spec, files = _record(file, SafetySpec.model_validate)
    with torch.device("meta"):
        head = SafetyHead(spec.vision, concepts=spec.concepts, special=spec.special)
    tower = _checked(files["vision"]).renamed(
        lambda key: key.replace("vision_model.", "vision_model.vision_model.", 1)
    )
    own = _checked(files["concepts"])
    both = tower.replace({**tower.entries, **own.entries})
    load_into(head, both, dtype=torch.float32)
    return spec, head, _digest(files)


def _record(file: Path, validate: Callable[[Any], Any]) -> tuple[Any, dict[str, dict[str, str]]]:
    try:
        record: dict[str, Any] = json.loads(file.read_text())
        return validate(record["spec"]), record["files"]
    except (ValueError, KeyError) as error:
        raise WeightsError(file, f"is damaged: {error}.", _AGAIN) from error


def _checked(file: dict[str, str]) -> StateDict:
    """Weights whose digest is the one that was written down."""
    path = FAMILY / file["path"]
    if not path.is_file():
        raise WeightsError(path, "is missing.", _AGAIN)
    if sha256(path) != file["sha256"]:
        raise WeightsError(path, "does not match its SHA-256.", _AGAIN)
    return read_weights(path)


def _built(build: Callable[[], Net], file: dict[str, str], dtype: torch.dtype) -> Net:
    with torch.device("meta"):
        net = build()
    tensors = _checked(file)
    if isinstance(net, TinyDecoder):  # published beside an encoder, under its own name
        tensors = tensors.renamed(lambda key: key.removeprefix("decoder."))
    load_into(net, tensors, dtype=dtype)
    return net


def _digest(files: dict[str, dict[str, str]]) -> str:
    return digest_of(file["sha256"] for _, file in sorted(files.items()) if "sha256" in file)
