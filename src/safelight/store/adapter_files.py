"""Files of adapters: LoRA in every program's wrapping, textual inversion in its four layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safelight.errors import WeightsError
from safelight.store.components import read_json
from safelight.store.weights import Entry, StateDict, read_weights

PEFT_KEY = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's settings in a safetensors file, as JSON."""
MAX_VECTORS = 1024
"""Most vectors of one textual inversion; a prompt's window holds 75."""


def read_lora_file(path: str | Path) -> tuple[StateDict, dict[str, str]]:
    """A LoRA's tensors and its metadata.

    PEFT keeps its settings in ``adapter_config.json`` beside the weights; they are put where
    diffusers keeps them, in the metadata.

    Raises:
        WeightsError: broken, or a pickle that asks for anything but tensors.
    """
    path = Path(path)
    state = read_weights(path)
    metadata = {k: v for k, v in state.extra.items() if isinstance(v, str)}
    config = path.parent / "adapter_config.json"
    if path.stem == "adapter_model" and config.is_file() and PEFT_KEY not in metadata:
        metadata[PEFT_KEY] = json.dumps(read_json(config))
    return state, metadata


def read_embedding_file(path: str | Path, token: str | None = None) -> dict[str, Entry]:
    """Textual inversion (Gal et al. 2022, 2208.01618): what its words mean.

    ======================  ============================================================
    diffusers               ``{"<token>": (D) or (n, D)}``, pickled or safetensors
    A1111, pickled          ``{"string_to_param": {"*": (n, D)}, "name": ...}``
    A1111, safetensors      ``{"emb_params": (n, D)}``; the file's name is the token
    a bare tensor           the caller says the token
    ======================  ============================================================

    Args:
        path: the file.
        token: the word to write in prompts instead of the file's own.

    Returns:
        by word, vectors ``(n, D)``, unread.

    Raises:
        WeightsError: none of these, or the word is not known.
    """
    path = Path(path)
    found = _vectors(path)
    if token is not None:
        if len(found) != 1:
            raise WeightsError(path, f"has {len(found)} words; one cannot stand for all.")
        found = {token: next(iter(found.values()))}
    if "" in found:
        raise WeightsError(path, "is a bare tensor, which names no word.", f"Say {path}:WORD.")
    return {word: _rows(path, word, entry) for word, entry in found.items()}


def is_pickle(path: Path) -> bool:
    """Whether a file is torch's archive or a bare pickle, by its content.

    Raises:
        WeightsError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise WeightsError(path, f"cannot be read: {error.strerror or error}.") from error
    named = path.suffix in (".safetensors", ".sft")
    return not named and (start == b"PK" or start[:1] == b"\x80")


def _vectors(path: Path) -> dict[str, Entry]:
    """By word; an empty one where the file says none."""
    if is_pickle(path):
        from safelight.store.pickles import read_tree

        tree = read_tree(path)
    else:
        tree = dict(read_weights(path).entries)
    if isinstance(tree, Entry):
        return {"": tree}
    params: Any = tree.get("string_to_param") if isinstance(tree, Mapping) else None
    if isinstance(params, Mapping) and isinstance(tree, Mapping):
        name = tree.get("name")
        inner = [e for e in params.values() if isinstance(e, Entry)]
        if len(inner) == 1:
            return {name if isinstance(name, str) and name.strip() else path.stem: inner[0]}
    if isinstance(tree, Mapping):
        if isinstance(tree.get("emb_params"), Entry):
            return {path.stem: tree["emb_params"]}
        words = _entries(tree)
        if words and len(words) <= MAX_VECTORS:
            return words
    raise WeightsError(path, "is no textual inversion: expected a word and its vectors.")


def _entries(tree: Mapping[Any, Any]) -> dict[str, Entry]:
    """Words of a dictionary of vectors; nothing where it is something else."""
    if all(isinstance(k, str) and isinstance(e, Entry) for k, e in tree.items()):
        entries = dict(tree)
        if all(len(e.shape) in (1, 2) and e.dtype.is_floating_point for e in entries.values()):
            return entries
    return {}


def _rows(path: Path, word: str, entry: Entry) -> Entry:
    shape = entry.shape if len(entry.shape) == 2 else (1, *entry.shape)
    if len(shape) != 2 or not entry.dtype.is_floating_point or not 1 <= shape[0] <= MAX_VECTORS:
        raise WeightsError(path, f"has a tensor {entry.shape} for {word!r}, not (vectors, width).")
    if not word.strip() or len(word) > 200 or any(c.isspace() for c in word):
        raise WeightsError(path, f"its word is {word[:60]!r}.", f"Say another: {path}:WORD.")
    return entry.derive(shape, lambda tensor: tensor.reshape(shape))
