"""What a file is: a checkpoint, one component, an adapter, statistics. Nothing is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safelight.errors import WeightsError
from safelight.store import karlo, keymaps
from safelight.store.adapter_files import PEFT_KEY, is_pickle, read_embedding_file
from safelight.store.single_file import detect, guess, read_own_spec
from safelight.store.weights import Entry, StateDict, read_weights

_MAX_VALUE = 2000
_MAX_KEYS = 100
# Width of the text states that cross-attention reads, by the models that have them.
_WIDTHS = {768: "v1", 1024: "v2", 1280: "SDXL", 2048: "SDXL"}
_LORA_LAYOUTS = {
    "kohya": re.compile(r"^lora_\w+\.(lora_(down|up|mid)|hada_|lokr_|dora_|oft_|alpha)"),
    "PEFT": re.compile(r"\.lora_[AB](\.\w+)?\.weight$|lora_magnitude_vector"),
    "diffusers": re.compile(r"(_lora|\.lora|\.lora_linear_layer)\.(down|up)\.weight$"),
    "LyCORIS": re.compile(r"\.(hada|lokr|oft)_"),
}
_KINDS = {
    "DoRA": ("dora_scale", "lora_magnitude_vector"),
    "LoHa": ("hada_",),
    "LoKr": ("lokr_",),
    "OFT": ("oft_",),
}
_COMPONENTS = (
    ("unet", "a UNet of a published folder", "time_embedding.linear_1.weight"),
    ("vae", "an autoencoder of a published folder", "encoder.conv_in.weight"),
    ("vae", "an autoencoder in the original layout", "first_stage_model.encoder.conv_in.weight"),
    ("text", "a CLIP text tower", "text_model.final_layer_norm.weight"),
    ("vision", "a CLIP vision tower", "vision_model.post_layernorm.weight"),
    ("safety_checker", "a safety checker", "concept_embeds"),
    ("prior", "a prior of a published folder", "prd_embedding"),
)


def identify(path: str | Path) -> dict[str, Any]:
    """Describe a weights file as a document.

    Returns:
        ``kind`` (``checkpoint lora embedding component prior clip_stats unknown``), ``what`` in
        words, counts, number formats, and what that kind has to tell.

    Raises:
        WeightsError: it cannot be read, or is a pickle that asks for more than tensors.
    """
    path = Path(path)
    size = path.stat().st_size if path.is_file() else 0
    found = _small(path) or _large(path)
    return {"file": path, "bytes": size, **found}


def _small(path: Path) -> dict[str, Any] | None:
    """Pickles that are no dictionary of named tensors; None for all others."""
    if not is_pickle(path):
        return None
    from safelight.store.pickles import read_tree

    tree = read_tree(path)
    if isinstance(tree, tuple) and len(tree) == 2 and all(isinstance(t, Entry) for t in tree):
        width = max(tree[0].shape, default=0)
        what = f"statistics (mean, std) of picture embeddings {width} wide"
        return {"kind": "clip_stats", "what": what, "width": width}
    if isinstance(tree, Entry):
        return {
            "kind": "embedding",
            "what": f"a bare tensor {tree.shape}: perhaps a textual inversion without its word",
        }
    if isinstance(tree, Mapping) and "string_to_param" in tree:
        return _embedding(path)
    return None


def _large(path: Path) -> dict[str, Any]:
    state = read_weights(path)
    described: dict[str, Any] = {
        "tensors": len(state),
        "parameters": sum(_count(entry) for entry in state.entries.values()),
        "formats": _formats(state),
        "metadata": _metadata(state),
    }
    return {**_kind(path, state), **described}


def _kind(path: Path, state: StateDict) -> dict[str, Any]:
    names = list(state)
    if any(pattern.search(name) for name in names for pattern in _LORA_LAYOUTS.values()):
        return _lora(state)
    if f"{keymaps.UNET}.input_blocks.0.0.weight" in state:
        return _checkpoint(state)
    if karlo.is_karlo(state):
        return {"kind": "prior", "what": "Karlo's prior, its original file"}
    if {"mean", "std"} == set(names):
        width = max(state.entries["mean"].shape, default=0)
        what = f"statistics (mean, std) of picture embeddings {width} wide"
        return {"kind": "clip_stats", "what": what, "width": width}
    for part, what, sign in _COMPONENTS:
        if sign in state:
            return {"kind": "component", "what": what, "component": part}
    if len(state) <= 64 and all(len(e.shape) <= 2 for e in state.entries.values()):
        try:
            return _embedding(path)
        except WeightsError:
            pass
    return {"kind": "unknown", "what": f"not of this family: {guess(state)}"}


def _checkpoint(state: StateDict) -> dict[str, Any]:
    try:
        spec, notes = read_own_spec(state), []
        if spec is None:
            spec, notes = detect(state)
    except WeightsError as error:
        return {"kind": "unknown", "what": error.problem}
    ema = sum(name.startswith(f"{keymaps.EMA}.") for name in state) > _MAX_KEYS
    layers = spec.unet.layers_per_block
    return {
        "kind": "checkpoint",
        "what": f"an original single file of the family {spec.family}, predicting "
        f"{spec.schedule.prediction_type}, {layers} layer{'s' * (layers > 1)} a level, "
        f"{'with' if ema else 'without'} a moving average",
        "family": spec.family,
        "prediction_type": spec.schedule.prediction_type,
        "layers": layers,
        "ema": ema,
        "image_encoder": spec.vision is not None,
        "notes": notes,
    }


def _lora(state: StateDict) -> dict[str, Any]:
    layouts = [
        name for name, pattern in _LORA_LAYOUTS.items() if any(pattern.search(key) for key in state)
    ]
    text = " ".join(state)
    kinds = [kind for kind, signs in _KINDS.items() if any(sign in text for sign in signs)]
    downs = [e for n, e in state.entries.items() if re.search(r"(lora_down|lora_A|\.down)\b", n)]
    ranks = Counter(e.shape[0] for e in downs if e.shape)
    towers = {"text_encoder": ("lora_te", "text_encoder", "text_model")}
    parts = [p for p, signs in towers.items() if any(s in text for s in signs)]
    unet = any(s in text for s in ("lora_unet", "unet.", "down_blocks", "attn1"))
    parts = (["unet"] if unet else []) + parts
    base = _base(state)
    listed = ", ".join(map(str, sorted(ranks)))
    what = (
        f"a {' and '.join(kinds) or 'LoRA'} in {' and '.join(layouts)} layout, for "
        f"{' and '.join(parts) or 'unknown parts'}"
        + (f" of {base}" if base else "")
        + (f", rank {listed}" if ranks else "")
    )
    return {
        "kind": "lora",
        "what": what,
        "layout": layouts,
        "adapter": kinds or ["LoRA"],
        "components": parts,
        "layers": len(downs),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "base": base,
        "supported": not kinds,
    }


def _base(state: StateDict) -> str:
    """Which models' text a LoRA's cross-attention reads."""
    for name, entry in state.entries.items():
        key = name.replace(".", "_")
        if "attn2" in key and "to_k" in key and re.search(r"(lora_down|lora_A|down_weight)", key):
            return _WIDTHS.get(entry.shape[1] if len(entry.shape) > 1 else 0, "")
    return ""


def _embedding(path: Path) -> dict[str, Any]:
    words = read_embedding_file(path)
    listed = ", ".join(f"{word} ({e.shape[0]})" for word, e in list(words.items())[:8])
    width = next(iter(words.values())).shape[1]
    base = _WIDTHS.get(width, "")
    return {
        "kind": "embedding",
        "what": f"a textual inversion: {listed}, {width} wide" + (f" ({base})" if base else ""),
        "words": {word: entry.shape[0] for word, entry in words.items()},
        "width": width,
        "base": base,
    }


def _count(entry: Entry) -> int:
    total = 1
    for side in entry.shape:
        total *= side
    return total


def _formats(state: StateDict) -> dict[str, int]:
    names = (str(e.dtype).removeprefix("torch.") for e in state.entries.values())
    return dict(Counter(names).most_common())


def _metadata(state: StateDict) -> dict[str, str]:
    """What the file says beside its tensors, cut short."""
    return {
        str(key)[:_MAX_VALUE]: str(value)[:_MAX_VALUE]
        for key, value in list(state.extra.items())[:_MAX_KEYS]
        if key not in ("format", PEFT_KEY)
    }
