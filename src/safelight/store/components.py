"""One component's folder: which of its weights files to read, and under which names.

Published folders have grown for years: two formats, variants, shards, two spellings of the
autoencoder's attention, text towers with and without their outer name. All of that ends here;
above, every component has the names that :mod:`safelight.nets` uses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from safelight.errors import WeightsError
from safelight.spec import Record
from safelight.store import configs
from safelight.store.weights import StateDict, read_weights

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_EXTENSIONS = ("safetensors", "bin")
_MAX_JSON = 64 * 2**20
_OLD_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        WeightsError: missing, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ValueError(f"more than {_MAX_JSON} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(path, f"cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise WeightsError(path, "is not a JSON object.")
    return value


def find_weights(folder: Path, variant: str | None = None) -> tuple[Path | None, str | None]:
    """The weights file (or index of shards) of a component's folder.

    The variant is preferred to the plain file, safetensors to ``.bin``. Without a variant asked
    for and without a plain file, the only variant there is will do.

    Returns:
        ``(path, variant that it is of)``; ``(None, None)`` where there are no weights.
    """
    name, used = choose_weights(_names(folder), variant)
    return (None if name is None else folder / name), used


def choose_weights(names: Collection[str], variant: str | None) -> tuple[str | None, str | None]:
    """As :func:`find_weights`, of a list of file names."""
    for wanted in dict.fromkeys((variant, None)):
        for name in _candidates(wanted):
            if name in names:
                return name, wanted
    others = _variants(names)
    if variant is None and len(others) == 1:
        return choose_weights(names, others[0])
    return None, None


def variants(folder: Path) -> list[str]:
    """Names of the variants that a component's folder has."""
    return _variants(_names(folder))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _variants(names: Iterable[str]) -> list[str]:
    pattern = re.compile(
        rf"(?:{'|'.join(_STEMS)})"
        r"(?:\.(?P<whole>\w+)\.(?:safetensors|bin)"
        r"|\.(?:safetensors|bin)\.(?:index\.(?P<index>\w+)|(?P<old>\w+)\.index)\.json)"
    )
    found = set()
    for name in names:
        if match := pattern.fullmatch(name):
            found.add(match["whole"] or match["index"] or match["old"])
    return sorted(found)


def _candidates(variant: str | None) -> Iterator[str]:
    for extension in _EXTENSIONS:
        for stem in _STEMS:
            if variant is None:
                yield f"{stem}.{extension}"
                yield f"{stem}.{extension}.index.json"
            else:
                yield f"{stem}.{variant}.{extension}"
                yield f"{stem}.{extension}.index.{variant}.json"
                yield f"{stem}.{extension}.{variant}.index.json"


def read_component(
    folder: str | Path, kind: str, variant: str | None = None
) -> tuple[Record | None, StateDict | None, str | None]:
    """Read one component.

    Args:
        folder: the component's own folder.
        kind: ``unet``, ``vae``, ``text`` or ``vision``; any other is read without a spec and
            without renaming.
        variant: preferred variant of the weights.

    Returns:
        its spec, its unread weights (None where it has none) and the variant they are of.

    Raises:
        WeightsError: the config or the weights are missing or not of this family.
    """
    folder = Path(folder)
    path, used = find_weights(folder, variant)
    tensors = None if path is None else read_weights(path)
    if kind not in _READERS:
        return None, tensors, used
    file = folder / "config.json"
    config = read_json(file)
    if tensors is None:
        raise WeightsError(
            folder,
            "holds no weights (looked for diffusion_pytorch_model, model and pytorch_model, as "
            ".safetensors and .bin, whole or sharded).",
            f"Variants there: {', '.join(variants(folder)) or 'none'}.",
        )
    spec, tensors = _READERS[kind](config, file, tensors)
    return spec, tensors, used


def _read_unet(config: dict[str, Any], file: Path, tensors: StateDict) -> tuple[Record, StateDict]:
    return configs.unet_spec(config, file), tensors


def _read_vae(config: dict[str, Any], file: Path, tensors: StateDict) -> tuple[Record, StateDict]:
    return configs.vae_spec(config, file), modern_attention(tensors)


def _read_text(config: dict[str, Any], file: Path, tensors: StateDict) -> tuple[Record, StateDict]:
    if "text_config" in config:  # a whole CLIPModel
        config = config["text_config"] or config.get("text_config_dict") or {}
    tensors = text_names(tensors)
    projection = tensors.entries.get("text_projection.weight")
    width = projection.shape[0] if projection else 0
    return configs.text_spec(config, file, projection_width=width), tensors


def _read_vision(
    config: dict[str, Any], file: Path, tensors: StateDict
) -> tuple[Record, StateDict]:
    return configs.vision_spec(config, file), vision_names(tensors)


_READERS = {
    "unet": _read_unet,
    "vae": _read_vae,
    "text": _read_text,
    "vision": _read_vision,
}


def modern_attention(tensors: StateDict) -> StateDict:
    """Autoencoder attention under today's names, as matrices.

    Old files say ``query key value proj_attn``, and some keep the matrices as 1x1 convolutions.
    """

    def rule(name: str) -> str:
        head, found, tail = name.partition(".attentions.0.")
        first, _, rest = tail.partition(".")
        return f"{head}{found}{_OLD_ATTENTION[first]}.{rest}" if first in _OLD_ATTENTION else name

    renamed = tensors.renamed(rule)
    for name, entry in renamed.entries.items():
        if ".attentions.0.to_" in name and len(entry.shape) == 4 and entry.shape[2:] == (1, 1):
            renamed.entries[name] = entry.derive(entry.shape[:2], lambda t: t[:, :, 0, 0])
    return renamed


def text_names(tensors: StateDict) -> StateDict:
    """A text tower's tensors under ``text_model.*`` and ``text_projection.weight``.

    transformers 5 leaves out the outer ``text_model.``; older files have the ``position_ids``
    buffer; a whole ``CLIPModel`` has the other tower and the temperature.
    """

    def rule(name: str) -> str | None:
        if name.endswith("position_ids"):
            return None
        if name.startswith(("text_model.", "text_projection.")):
            return name
        if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
            return f"text_model.{name}"
        if name.startswith(("vision_model.", "visual_projection.")) or name == "logit_scale":
            return None
        return name

    return tensors.renamed(rule)


def vision_names(tensors: StateDict) -> StateDict:
    """A vision tower's tensors under ``vision_model.*`` and ``visual_projection.weight``.

    From a whole ``CLIPModel`` the text tower and the temperature are left out.
    """

    def rule(name: str) -> str | None:
        if name.endswith("position_ids") or name == "logit_scale":
            return None
        if name.startswith(("text_model.", "text_projection.")):
            return None
        if name.startswith(("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")):
            return f"vision_model.{name}"
        return name

    return tensors.renamed(rule)
