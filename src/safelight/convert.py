"""A published folder to an original single file, and the other way round.

Tensors are renamed and laid out anew, never computed: there and back again is equal bit by bit.
Nothing is loaded into networks; tensors are read one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelight.errors import InvalidRequest, WeightsError
from safelight.model import Model, read_tokenizer
from safelight.spec import PriorSpec
from safelight.store import karlo
from safelight.store.checkers import attach_checker
from safelight.store.folder import FolderContents, copy_parts, read_folder, write_folder
from safelight.store.prior import attach_prior, write_prior_net
from safelight.store.single_file import read_single_file, write_single_file
from safelight.store.weights import StateDict, read_weights

_SINGLE = (".safetensors", ".sft")
_PARTS = ("unet", "vae", "text", "vision", "image_normalizer")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert(
    source: str | Path, target: str | Path, *, dtype: str | None = None, **original: Any
) -> dict[str, Any]:
    """Convert a model. The target's ending chooses the layout.

    Args:
        source: a folder in the published layout, or an original single file; or Karlo's prior.
        target: ``NAME.safetensors`` for a single file, anything else for a new folder.
        dtype: of the tensors; None keeps theirs.
        original: how to read a single file (:func:`~safelight.store.single_file.read_single_file`).

    Returns:
        name, family, bytes and notes.

    Raises:
        InvalidRequest: source and target are of one layout, or the target is there already.
        WeightsError: the source is broken, or not of this family.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if not source.exists():
        raise InvalidRequest("SRC", f"no file or folder {source}.")
    single = target.suffix.lower() in _SINGLE
    if target.suffix.lower() in (".ckpt", ".pt", ".bin", ".pth"):
        raise InvalidRequest("DST", "pickles are read, not written.", "Name it .safetensors.")
    if target.exists() and (not target.is_dir() or any(target.iterdir()) or single):
        raise InvalidRequest("DST", f"{target} is there already.", "Name a new one.")
    kind = None if dtype is None else _DTYPES[dtype]
    if source.is_dir():
        if not single:
            raise InvalidRequest("DST", "a folder to a folder.", "Name it .safetensors.")
        for name in set(original) - {"tokenizer"}:
            raise InvalidRequest(name, f"is for original single files, and {source} is none.")
        if (source / "prior").is_dir() and not (source / "unet").is_dir():
            return _prior_to_file(source / "prior", target, kind)
        return _to_file(read_folder(source), target, kind)
    if single:
        raise InvalidRequest("DST", "a single file to a single file.", "Name a folder.")
    if karlo.is_karlo(read_weights(source)):
        return _prior_to_folder(source, target, kind, original)
    return _to_folder(read_single_file(source, **original), source, target, kind)


def write_model(model: Model, folder: Path, *, dtype: str | None = None) -> None:
    """A loaded model as a published folder, whole: with its statistics, prior and checker.
    Text-to-image pipelines have no vision tower: it stays out.

    Args:
        dtype: of the tensors; None keeps theirs.
    """
    spec = model.spec
    if spec.family not in ("image-variations", "unclip"):
        spec = spec.replace(vision=None)
    states = {
        part: net.state_dict()
        for part, net in model.networks.items()
        if part != "vision" or spec.vision is not None
    }
    if model.normaliser is not None:
        states["image_normalizer"] = dict(zip(("mean", "std"), model.normaliser, strict=True))
    kind = None if dtype is None else _DTYPES[dtype]
    write_folder(folder, spec, states, model.tokenizer, dtype=kind)
    if (prior := model.prior) is not None:
        nets = prior.net.state_dict(), prior.text.state_dict()
        attach_prior(folder, prior.spec, *nets, prior.tokenizer, dtype=kind)
    if model.checker is not None:
        attach_checker(folder, model.checker.spec, model.checker.head.state_dict())
    if spec.family == "depth":
        copy_parts(Path(model.source), folder, ("depth_estimator", "feature_extractor"))


def _to_file(contents: FolderContents, target: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    states = {p: s for p, s in contents.tensors.items() if p in _PARTS}
    spec, notes = contents.spec, list(contents.notes)
    if spec.family not in ("image-variations", "unclip"):
        states.pop("vision", None)
        spec = spec.replace(vision=None)
    if spec.family != "unclip":
        states.pop("image_normalizer", None)
    dropped = sorted(set(contents.tensors) - set(states))
    if dropped:
        notes.append(f"single files have no place for: {', '.join(dropped)}")
    write_single_file(target, spec, states, dtype=dtype)
    return _done(spec.name, spec.family, target, notes)


def _to_folder(
    contents: FolderContents, source: Path, target: Path, dtype: torch.dtype | None
) -> dict[str, Any]:
    tokenizer = read_tokenizer(contents, source)
    write_folder(target, contents.spec, contents.tensors, tokenizer, dtype=dtype)
    return _done(contents.spec.name, contents.spec.family, target, list(contents.notes))


def _prior_to_folder(
    source: Path, target: Path, dtype: torch.dtype | None, original: Mapping[str, Any]
) -> dict[str, Any]:
    for name in set(original) - {"clip_stats"}:
        raise InvalidRequest(name, "a prior has no use for it.")
    spec, state = karlo.read_karlo_prior(source, original.get("clip_stats"))
    write_prior_net(target / "prior", spec, state, dtype)
    note = (
        "a prior needs CLIP L's text tower with projection too: put text_encoder/ and tokenizer/ "
        "of openai/clip-vit-large-patch14 beside prior/"
    )
    return _done(source.stem, "prior", target, [note])


def _prior_to_file(folder: Path, target: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    from safelight.store.components import find_weights, read_json

    config = read_json(folder / "config.json")
    weights, _ = find_weights(folder)
    if weights is None:
        raise WeightsError(folder, "holds no weights.")
    width = config.get("attention_head_dim", 64)
    spec = PriorSpec(
        heads=config.get("num_attention_heads", 32),
        head_width=width,
        layers=config.get("num_layers", 20),
        embedding_width=config.get("embedding_dim", 768),
        text_tokens=config.get("num_embeddings", 77),
    )
    state: Mapping[str, Tensor] = read_weights(weights)
    karlo.write_karlo_prior(target, spec, StateDict.of(state), dtype)
    return _done(folder.parent.name, "prior", target, [])


def _done(name: str, family: str, target: Path, notes: list[str]) -> dict[str, Any]:
    files = [target] if target.is_file() else [p for p in target.rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in files)
    return {"name": name, "family": family, "target": target, "bytes": size, "notes": notes}
