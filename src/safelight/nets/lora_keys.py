"""The key layouts of LoRA files: kohya's, diffusers' two older ones, and PEFT's.

kohya joins a layer's path by underscores, which cannot be undone by rule ("to_out_0", "mid_block"
and "proj_in" all have their own). So nothing is parsed: every spelling of every layer that the
networks at hand have is written into one table, and a key that is not in it is an error.

======================  =============================================================
kohya                   ``lora_unet_down_blocks_0_..._to_q.lora_down.weight``,
                        ``....lora_up.weight``, ``....alpha``; layers of the original
                        repository's names too (``lora_unet_input_blocks_1_1_...``)
diffusers, processors   ``unet.....attn1.processor.to_q_lora.down.weight``
diffusers               ``unet.....attn1.to_q.lora.down.weight``; in text towers
                        ``...q_proj.lora_linear_layer.down.weight``
PEFT                    ``unet.....attn1.to_q.lora_A.weight`` and ``lora_B``; alpha in
                        the file's metadata; ``base_model.model.....`` where PEFT itself
                        saved one network, alpha in ``adapter_config.json``
======================  =============================================================
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safelight.errors import WeightsError
from safelight.nets.lora import Adapter, Pair, fit, layers

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's settings in a safetensors file, as JSON."""

KOHYA_PREFIXES = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}

_ENDINGS = (
    ("down", re.compile(r"\.lora_down\.weight$|\.lora_A(\.\w+)?\.weight$")),
    ("up", re.compile(r"\.lora_up\.weight$|\.lora_B(\.\w+)?\.weight$")),
    ("down", re.compile(r"(\.lora|_lora|\.lora_linear_layer)\.down\.weight$")),
    ("up", re.compile(r"(\.lora|_lora|\.lora_linear_layer)\.up\.weight$")),
    ("alpha", re.compile(r"(_lora)?\.alpha$")),
)


# -- the table of spellings ---------------------------------------------------------------------


Originals = Mapping[str, Iterable[Sequence[Any]]]
"""By component, rows that begin (original name, published name) of a module: those of
:func:`safelight.store.keymaps.unet_rows`, handed in because columns do not import each other."""


def spellings(
    networks: Mapping[str, nn.Module], originals: Originals | None = None
) -> dict[str, tuple[str, str]]:
    """Every stem under which a file may know a layer, to (component, path).

    Args:
        networks: by component: ``unet``, ``text_encoder``.
        originals: the original repository's names, which some of kohya's files use.
    """
    table: dict[str, tuple[str, str]] = {}
    bare: Counter[str] = Counter()
    for component, network in networks.items():
        rows = list((originals or {}).get(component, ()))
        for path in layers(network):
            for stem in _stems(component, path, _original(path, rows)):
                if table.setdefault(stem, (component, path)) != (component, path):
                    raise ValueError(f"{stem} could be {path} or {table[stem][1]}")
            bare[path] += 1
    for component, network in networks.items():
        for path in layers(network):
            # Without a component's name only where it can mean one layer.
            if bare[path] == 1:
                for dotted in dict.fromkeys((path, path.removeprefix("text_model."))):
                    for stem in (dotted, _processor(dotted), f"base_model.model.{dotted}"):
                        table.setdefault(stem, (component, path))
    return table


def _stems(component: str, path: str, original: str | None) -> Iterator[str]:
    # transformers 5 drops this part of a text tower's names.
    for dotted in dict.fromkeys((path, path.removeprefix("text_model."))):
        yield f"{component}.{dotted}"
        yield f"{component}.base_model.model.{dotted}"
        yield f"{component}.{_processor(dotted)}"
    for prefix in KOHYA_PREFIXES.get(component, (f"lora_{component}_",)):
        for name in (path, original):
            if name:
                yield prefix + name.replace(".", "_")


def _processor(path: str) -> str:
    """``attn1.to_out.0`` was ``attn1.processor.to_out``; in text towers ``q_proj`` was ``to_q``."""
    parent, _, last = path.removesuffix(".0").rpartition(".")
    if last in ("to_q", "to_k", "to_v", "to_out"):
        return f"{parent}.processor.{last}"
    if parent.endswith("self_attn"):
        return f"{parent}.to_{last.removesuffix('_proj')}"
    return path


def _original(path: str, rows: Iterable[Sequence[Any]]) -> str | None:
    for original, published, *_ in rows:
        if published and (path == published or path.startswith(f"{published}.")):
            return original + path[len(published) :]
    return None


# -- reading ------------------------------------------------------------------------------------


def read(
    state: Mapping[str, Tensor],
    networks: Mapping[str, nn.Module],
    *,
    metadata: Mapping[str, str] | None = None,
    originals: Originals | None = None,
    source: object = "LoRA",
    unmatched: list[str] | None = None,
) -> dict[str, Adapter]:
    """Adapters from a file's tensors, in any of the layouts, by component.

    Args:
        networks: by component (``unet``, ``text_encoder``): give every one that the file may
            adapt. They are only looked at.
        metadata: the safetensors file's, for PEFT's alpha. Without any alpha it is the rank.
        originals: as for :func:`spellings`.
        source: the file, for messages.
        unmatched: gets the keys that belong to no layer here, which are an error without it.
            Where nothing belongs to a layer, that is an error all the same.

    Raises:
        WeightsError: keys that belong to no layer or whose partner is missing (all are listed),
            shapes that do not fit, or an adapter of another kind than LoRA.
    """
    table = spellings(networks, originals)
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    unknown = []
    for key, value in state.items():
        kind, stem = _split(key)
        if stem in table and kind not in found.get(table[stem], {}):
            found.setdefault(table[stem], {})[kind] = value
        else:
            unknown.append(key)
    if other := _other_kind(unknown):
        raise WeightsError(source, other, "Only LoRA and LoCon are supported.")
    if not found or (unknown and unmatched is None):
        listed = ", ".join(unknown[:_LISTED]) + (" …" if len(unknown) > _LISTED else "")
        raise WeightsError(source, f"keys of no layer here: {listed or 'none'}.", _hint(unknown))
    if unmatched is not None:
        unmatched += unknown
    if alone := [f"{c}.{p}" for (c, p), parts in found.items() if not {"down", "up"} <= set(parts)]:
        raise WeightsError(source, f"one of the two factors is missing: {', '.join(alone)}.")
    alphas = _Alphas(metadata, source)
    adaptable = {component: layers(network) for component, network in networks.items()}
    pairs: dict[str, dict[str, Pair]] = {}
    for (component, path), parts in found.items():
        down, up = parts["down"], parts["up"]
        try:
            rank = _rank(down, up)
            alpha = _scalar(parts["alpha"]) if "alpha" in parts else alphas(component, path, rank)
            pair = fit(Pair(down, up, float(alpha)), adaptable[component][path])
        except ValueError as error:
            raise WeightsError(source, f"{component}.{path}: {error}") from None
        pairs.setdefault(component, {})[path] = pair
    return {component: Adapter(inner) for component, inner in pairs.items()}


def _split(key: str) -> tuple[str, str]:
    for kind, ending in _ENDINGS:
        if match := ending.search(key):
            return kind, key[: match.start()]
    return "", ""


def _rank(down: Tensor, up: Tensor) -> int:
    if not all(t.ndim in (2, 4) and t.is_floating_point() and t.shape[0] for t in (down, up)):
        raise ValueError(f"{tuple(down.shape)} and {tuple(up.shape)} are no low-rank factors")
    return down.shape[0]


def _scalar(alpha: Tensor) -> float:
    if alpha.numel() != 1 or not math.isfinite(alpha.item()):
        raise ValueError("its alpha is not a number")
    return alpha.item()


_LISTED = 20
# What only other kinds of adapters have in their keys, and in PEFT's settings.
_KINDS = {
    "DoRA, which normalises weights": ("dora_scale", "lora_magnitude_vector"),
    "LoHa": ("hada_", "LOHA"),
    "LoKr": ("lokr_", "LOKR"),
    "OFT": ("oft_", "BOFT", "OFT"),
    "LoCon with a Tucker decomposition": ("lora_mid.",),
    "GLoRA": (".a1.weight", ".b1.weight"),
    "(IA)³": ("on_input", "ia3_", "IA3"),
    "set of full differences": (".diff_b", ".diff"),
}


def _other_kind(unknown: Iterable[str]) -> str:
    """What is wrong, where keys are of an adapter of another kind; else nothing."""
    text = " ".join(unknown)
    for kind, signs in _KINDS.items():
        if any(sign in text for sign in signs):
            return f"is a {kind}."
    return ""


def _hint(unknown: Iterable[str]) -> str:
    text = " ".join(unknown)
    if any(kind in text for kind in ("lora_te2_", "text_encoder_2", "transformer.")):
        return "This was made for another family of models."
    return "It was made for another model, or for a part of it (unet, text_encoder) not given here."


class _Alphas:
    """PEFT's alpha of a layer, from the metadata that diffusers writes."""

    def __init__(self, metadata: Mapping[str, str] | None, source: object) -> None:
        self.settings: dict[str, Any] = {}
        if metadata and METADATA_KEY in metadata:
            try:
                self.settings = json.loads(metadata[METADATA_KEY])
                if not isinstance(self.settings, dict):
                    raise ValueError("is not a JSON object")
            except (ValueError, RecursionError) as error:
                raise WeightsError(source, f"metadata {METADATA_KEY}: {error}") from None
        self.source = source
        if any(v for k, v in self.settings.items() if k.endswith("use_dora")):
            raise WeightsError(source, "is a DoRA.", "Only LoRA and LoCon are supported.")
        for key, kind in self.settings.items():
            if key.endswith("peft_type") and str(kind).rpartition(".")[2] != "LORA":
                raise WeightsError(source, f"is a {kind} adapter.", "Only LoRA is supported.")

    def __call__(self, component: str, path: str, rank: int) -> float:
        def setting(name: str) -> Any:
            return self.settings.get(f"{component}.{name}", self.settings.get(name))

        alpha = setting("lora_alpha")
        if alpha is None:
            return rank
        patterns = setting("alpha_pattern") or {}
        try:
            alpha = next((v for p, v in patterns.items() if _ends_like(path, p)), alpha)
            # Rank-stabilised (Kalajdzievski 2023, 2312.03732): alpha / sqrt(rank).
            return float(alpha) * rank**0.5 if setting("use_rslora") else float(alpha)
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise WeightsError(self.source, f"alpha of {path}: {error}.") from None


def _ends_like(path: str, pattern: str) -> bool:
    """PEFT: "^" anchors a pattern, which otherwise matches the end of a path."""
    # A repeated group can take for ever to match, and the pattern is a stranger's.
    if len(pattern) > 512 or re.search(r"\)[*+?{]", pattern):
        raise ValueError(f"the pattern {pattern[:60]!r} is too involved")
    start = "" if pattern.startswith("^") else r"(.*\.)?"
    return re.match(rf"{start}({pattern.removeprefix('^')})$", path) is not None


# -- writing ------------------------------------------------------------------------------------


def write(
    adapters: Mapping[str, Adapter], layout: Literal["kohya", "diffusers", "peft"] = "peft"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata for a safetensors file, by component (``unet``, ``text_encoder``).

    kohya's layout has a key for each alpha, PEFT's keeps them in the metadata; diffusers' own
    has no place for them, so there they are multiplied in.
    """
    state: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component, adapter in adapters.items():
        for path, pair in adapter.pairs.items():
            down, up = pair.down.detach().contiguous(), pair.up.detach().contiguous()
            if layout == "kohya":
                prefix = KOHYA_PREFIXES.get(component, (f"lora_{component}_",))[0]
                stem = prefix + path.replace(".", "_")
                state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
                state[f"{stem}.alpha"] = torch.tensor(pair.alpha)
            elif layout == "diffusers":
                stem = f"{component}.{path}"
                kind = "lora_linear_layer" if component.startswith("text_encoder") else "lora"
                up = up * pair.scale
                state |= {f"{stem}.{kind}.down.weight": down, f"{stem}.{kind}.up.weight": up}
            else:
                stem = f"{component}.{path}"
                state |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        if layout == "peft" and adapter.pairs:
            settings |= {f"{component}.{k}": v for k, v in _peft_settings(adapter).items()}
    return state, {METADATA_KEY: json.dumps(settings, sort_keys=True)} if settings else {}


def _peft_settings(adapter: Adapter) -> dict[str, Any]:
    pairs = adapter.pairs
    rank = Counter(pair.rank for pair in pairs.values()).most_common(1)[0][0]
    alpha = Counter(pair.alpha for pair in pairs.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{p}": pair.rank for p, pair in pairs.items() if pair.rank != rank},
        "alpha_pattern": {f"^{p}": pair.alpha for p, pair in pairs.items() if pair.alpha != alpha},
        # Matched by how paths end, with or without what transformers 5 drops in front.
        "target_modules": sorted(path.removeprefix("text_model.") for path in pairs),
    }
