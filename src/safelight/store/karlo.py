"""Karlo's prior in its original file, and as a published component.

The original stacks query, key and value *by head*: rows of head 0's query, key and value, then
head 1's, and so on, 64 rows each. The statistics of CLIP's embeddings lie in a file of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from safelight.errors import InvalidRequest, WeightsError
from safelight.spec import PriorSpec
from safelight.store.clip_stats import read_clip_stats
from safelight.store.weights import Entry, StateDict, read_weights, save_safetensors

PREFIX = "model"
HEAD_WIDTH = 64
"""Of every head in the original; a file cannot say it."""

_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "clip_img_proj": "proj_in",
    "text_emb_proj": "embedding_proj",
    "text_enc_proj": "encoder_hidden_states_proj",
    "positional_embedding": "positional_embedding",
    "prd_emb": "prd_embedding",
    "final_ln": "norm_out",
    "out_proj": "proj_to_clip_embeddings",
}
_BLOCK = {
    "ln_1": "norm1",
    "ln_2": "norm3",
    "attn.c_proj": "attn1.to_out.0",
    "mlp.c_fc": "ff.net.0.proj",
    "mlp.c_proj": "ff.net.2",
}
_QKV = re.compile(r"transformer\.resblocks\.(\d{1,3})\.attn\.c_qkv\.(weight|bias)")
_INSIDE = re.compile(r"transformer\.resblocks\.(\d{1,3})\.(.+)\.(weight|bias)")


def is_karlo(state: StateDict) -> bool:
    """Whether a file is Karlo's prior."""
    return f"{PREFIX}.prd_emb" in state and f"{PREFIX}.clip_img_proj.weight" in state


def read_karlo_prior(
    path: str | Path, clip_stats: str | Path | None, *, head_width: int = HEAD_WIDTH
) -> tuple[PriorSpec, StateDict]:
    """The prior's spec and its weights under published names, unread.

    Args:
        path: the original file (``prior-ckpt-step=...ckpt``).
        clip_stats: Karlo's ``ViT-L-14_stats.th``. None: those that the file carries, where
            :func:`write_karlo_prior` wrote it.

    Raises:
        WeightsError: it is something else, or holds names that no prior has.
        InvalidRequest: there are no statistics.
    """
    state = read_weights(path)
    if not is_karlo(state):
        raise WeightsError(path, "is not Karlo's prior: it lacks model.prd_emb.")
    out: dict[str, Entry] = {}
    unknown, blocks = [], set()
    inside: dict[str, Entry] = {}
    for name, entry in state.entries.items():
        short = name.removeprefix(f"{PREFIX}.")
        if short in ("clip_mean", "clip_std"):
            inside[short] = entry
        elif match := _QKV.fullmatch(short):
            blocks.add(int(match[1]))
            out |= _apart(f"transformer_blocks.{match[1]}.attn1", match[2], entry, head_width, name)
        elif (match := _INSIDE.fullmatch(short)) and match[2] in _BLOCK:
            blocks.add(int(match[1]))
            out[f"transformer_blocks.{match[1]}.{_BLOCK[match[2]]}.{match[3]}"] = entry
        elif new := _outside(short):
            out[new] = entry
        elif not short.endswith("causal_mask") and not short.startswith("mask"):
            unknown.append(name)
    if unknown:
        listed = "; ".join(unknown[:8])
        raise WeightsError(path, f"holds {len(unknown)} tensors that no prior has: {listed}.")
    spec = _spec(Path(path), out, len(blocks), head_width)
    if clip_stats is not None:
        stats = read_clip_stats(clip_stats, spec.embedding_width)
        out |= {f"clip_{name}": entry for name, entry in stats.entries.items()}
    elif len(inside) == 2:
        out |= inside
    else:
        raise InvalidRequest(
            "clip_stats",
            f"{Path(path).name} is Karlo's prior, whose statistics are in another file.",
            "Give --clip-stats ViT-L-14_stats.th, published beside it.",
        )
    return spec, state.replace(out)


def write_karlo_prior(
    path: str | Path, spec: PriorSpec, states: Mapping[str, Tensor], dtype: torch.dtype | None
) -> None:
    """The original layout, with the statistics inside under names that others pass over."""
    source = StateDict.of(states)
    outside = {new: old for old, new in _OUTSIDE.items()}
    block = {new: old for old, new in _BLOCK.items()}
    out: dict[str, Entry] = {}
    for name, entry in source.entries.items():
        head, _, tail = name.rpartition(".")
        if name in outside or name in ("clip_mean", "clip_std"):
            out[f"{PREFIX}.{outside.get(name, name)}"] = entry
        elif head in outside:
            out[f"{PREFIX}.{outside[head]}.{tail}"] = entry
        elif match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", head):
            stem = f"{PREFIX}.transformer.resblocks.{match[1]}"
            if match[2] in block:
                out[f"{stem}.{block[match[2]]}.{tail}"] = entry
            elif match[2] == "attn1.to_q":
                names = [name.replace("to_q", f"to_{x}") for x in "qkv"]
                three = [source.entries[n] for n in names]
                out[f"{stem}.attn.c_qkv.{tail}"] = _together(three, spec.head_width)
    save_safetensors(path, StateDict({n: e.cast(dtype) for n, e in out.items()}, Path(path)))


def _outside(short: str) -> str:
    if short in _OUTSIDE:
        return _OUTSIDE[short]
    head, _, tail = short.rpartition(".")
    return f"{_OUTSIDE[head]}.{tail}" if head in _OUTSIDE and tail in ("weight", "bias") else ""


def _spec(path: Path, out: Mapping[str, Entry], layers: int, head_width: int) -> PriorSpec:
    position, proj = out.get("positional_embedding"), out.get("proj_in.weight")
    if position is None or proj is None or len(position.shape) != 3 or len(proj.shape) != 2:
        raise WeightsError(path, "lacks the prior's positions or its first layer.")
    extra = PriorSpec().extra_tokens
    return PriorSpec(
        heads=proj.shape[0] // head_width,
        head_width=head_width,
        layers=layers,
        embedding_width=proj.shape[1],
        text_tokens=position.shape[1] - extra,
    )


def _apart(stem: str, part: str, entry: Entry, head: int, name: str) -> dict[str, Entry]:
    rows, rest = entry.shape[0], entry.shape[1:]
    if rows % (3 * head):
        raise WeightsError(entry.file, f"{name} has {rows} rows, not three times {head} a head.")

    def take(tensor: Tensor, which: int) -> Tensor:
        return tensor.reshape(-1, 3, head, *rest)[:, which].reshape(rows // 3, *rest)

    return {
        f"{stem}.to_{x}.{part}": entry.derive((rows // 3, *rest), lambda t, i=i: take(t, i))
        for i, x in enumerate("qkv")
    }


def _together(three: list[Entry], head: int) -> Entry:
    rows, rest = three[0].shape[0], three[0].shape[1:]

    def read() -> Tensor:
        parts = [entry.read().reshape(-1, 1, head, *rest) for entry in three]
        return torch.cat(parts, dim=1).reshape(3 * rows, *rest)

    return three[0]._replace(shape=(3 * rows, *rest), read=read)
