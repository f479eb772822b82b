"""The original single-file layout and the published one, as one table of rows.

A row says where a module (or one parameter) lies in the original latent-diffusion code and where
in the published folders. The same rows are read in both directions. ``None`` in place of the
published name marks what is dropped on purpose; a name without a row is an error.

Block arithmetic: with ``n = layers_per_block + 1``, ``input_blocks.i`` (i >= 1) is level
``(i - 1) // n``, layer ``(i - 1) % n`` (the last of a level is its downsampler), and
``output_blocks.i`` is up level ``i // n``, layer ``i % n``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from safelight.errors import WeightsError
from safelight.spec import ModelSpec, TextSpec, UNetSpec, VAESpec, VisionSpec
from safelight.store.weights import Entry, StateDict

Change = Literal["same", "square", "transpose", "qkv"]
"""How the tensor differs: not at all; a (C, C) matrix that the original keeps as a 1x1
convolution; a transposed matrix; query, key and value stacked in the original."""


class Row(NamedTuple):
    """One module or parameter in both layouts."""

    original: str
    published: str | None
    change: Change = "same"


def _below(original: str, published: str, table: dict[str, str]) -> list[Row]:
    return [Row(f"{original}.{old}", f"{published}.{new}") for old, new in table.items()]


# -- UNet -----------------------------------------------------------------------------------------

_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_OUTSIDE = [
    Row("time_embed.0", "time_embedding.linear_1"),
    Row("time_embed.2", "time_embedding.linear_2"),
    Row("label_emb.0.0", "class_embedding.linear_1"),
    Row("label_emb.0.2", "class_embedding.linear_2"),
    Row("label_emb.weight", "class_embedding.weight"),
    Row("input_blocks.0.0", "conv_in"),
    Row("middle_block.1", "mid_block.attentions.0"),
    *_below("middle_block.0", "mid_block.resnets.0", _UNET_RESNET),
    *_below("middle_block.2", "mid_block.resnets.1", _UNET_RESNET),
    Row("out.0", "conv_norm_out"),
    Row("out.2", "conv_out"),
]


def unet_rows(spec: UNetSpec) -> list[Row]:
    """Rows of the UNet; transformer blocks have the same names inside in both layouts."""
    rows = list(_UNET_OUTSIDE)
    levels, n = len(spec.channels), spec.layers_per_block + 1
    for level in range(levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        last = level == levels - 1
        for layer in range(n):
            block = f"input_blocks.{level * n + layer + 1}"
            if layer == spec.layers_per_block:
                rows += [] if last else [Row(f"{block}.0.op", f"{down}.downsamplers.0.conv")]
                continue
            rows += _below(f"{block}.0", f"{down}.resnets.{layer}", _UNET_RESNET)
            if spec.attention[level]:
                rows.append(Row(f"{block}.1", f"{down}.attentions.{layer}"))
        attention = spec.attention[levels - 1 - level]
        for layer in range(n):
            block = f"output_blocks.{level * n + layer}"
            rows += _below(f"{block}.0", f"{up}.resnets.{layer}", _UNET_RESNET)
            if attention:
                rows.append(Row(f"{block}.1", f"{up}.attentions.{layer}"))
            if layer == n - 1 and not last:
                rows.append(Row(f"{block}.{1 + attention}.conv", f"{up}.upsamplers.0.conv"))
    return rows


# -- autoencoder ----------------------------------------------------------------------------------

_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_VAE_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def vae_rows(spec: VAESpec) -> list[Row]:
    """Rows of the autoencoder. The original numbers the decoder's levels from fine to coarse."""
    rows = [Row(name, name) for name in ("quant_conv", "post_quant_conv")]
    rows.append(Row("loss", None))  # the discriminator of the training
    levels = len(spec.channels)
    for half in ("encoder", "decoder"):
        rows += [Row(f"{half}.{conv}", f"{half}.{conv}") for conv in ("conv_in", "conv_out")]
        rows.append(Row(f"{half}.norm_out", f"{half}.conv_norm_out"))
        attention = f"{half}.mid_block.attentions.0"
        rows.append(Row(f"{half}.mid.attn_1.norm", f"{attention}.group_norm"))
        for old, new in _VAE_ATTENTION.items():
            rows.append(Row(f"{half}.mid.attn_1.{old}", f"{attention}.{new}", "square"))
        for i in (0, 1):
            resnet = f"{half}.mid_block.resnets.{i}"
            rows += _below(f"{half}.mid.block_{i + 1}", resnet, _VAE_RESNET)
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        for layer in range(spec.layers_per_block + 1):
            if layer < spec.layers_per_block:
                resnet = f"encoder.down_blocks.{level}.resnets.{layer}"
                rows += _below(f"{down}.block.{layer}", resnet, _VAE_RESNET)
            resnet = f"decoder.up_blocks.{level}.resnets.{layer}"
            rows += _below(f"{up}.block.{layer}", resnet, _VAE_RESNET)
        if level < levels - 1:
            sampler = "samplers.0.conv"
            rows.append(
                Row(f"{down}.downsample.conv", f"encoder.down_blocks.{level}.down{sampler}")
            )
            rows.append(Row(f"{up}.upsample.conv", f"decoder.up_blocks.{level}.up{sampler}"))
    return rows


# -- CLIP towers ----------------------------------------------------------------------------------

_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _open_clip_layers(original: str, published: str, layers: int) -> Iterator[Row]:
    for i in range(layers):
        old, new = f"{original}.resblocks.{i}", f"{published}.encoder.layers.{i}"
        yield from _below(old, new, _OPEN_CLIP_LAYER)
        for part in ("weight", "bias"):
            # {} stands for q, k and v in turn.
            stacked = f"{new}.self_attn.{{}}_proj.{part}"
            yield Row(f"{old}.attn.in_proj_{part}", stacked, "qkv")


def clip_text_rows(spec: TextSpec) -> list[Row]:
    """The text tower of v1 files: transformers' own names, some files without ``text_model``."""
    parts = ("embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm")
    parts += tuple(f"encoder.layers.{i}" for i in range(spec.layers))
    return [
        Row("transformer.text_model.embeddings.position_ids", None),
        Row("transformer.embeddings.position_ids", None),
        Row("transformer.text_projection", "text_projection"),
        *(Row(f"transformer.text_model.{p}", f"text_model.{p}") for p in parts),
    ]


def flat_clip_text_rows(spec: TextSpec) -> list[Row]:
    """As :func:`clip_text_rows`, of files that lack ``text_model`` (read only)."""
    prefix = "transformer.text_model."
    return [
        row._replace(original=row.original.replace(prefix, "transformer."))
        for row in clip_text_rows(spec)
    ]


def open_clip_text_rows(spec: TextSpec) -> list[Row]:
    """The text tower of v2 files. Its last layer is not used, and the published one lacks it."""
    return [
        Row("model.positional_embedding", "text_model.embeddings.position_embedding.weight"),
        Row("model.token_embedding", "text_model.embeddings.token_embedding"),
        Row("model.ln_final", "text_model.final_layer_norm"),
        *_open_clip_layers("model.transformer", "text_model", spec.layers),
        Row(f"model.transformer.resblocks.{spec.layers}", None),
        *(Row(f"model.{name}", None) for name in ("text_projection", "logit_scale", "attn_mask")),
    ]


def open_clip_vision_rows(spec: VisionSpec) -> list[Row]:
    """The vision tower of unCLIP and image-variation files, in a whole CLIP model.

    The text tower beside it is dropped: the model reads its own.
    """
    visual, tower = "model.visual", "vision_model"
    embeddings = f"{tower}.embeddings"
    return [
        Row(f"{visual}.class_embedding", f"{embeddings}.class_embedding"),
        Row(f"{visual}.conv1", f"{embeddings}.patch_embedding"),
        Row(f"{visual}.positional_embedding", f"{embeddings}.position_embedding.weight"),
        Row(f"{visual}.ln_pre", f"{tower}.pre_layrnorm"),
        Row(f"{visual}.ln_post", f"{tower}.post_layernorm"),
        Row(f"{visual}.proj", "visual_projection.weight", "transpose"),
        *_open_clip_layers(f"{visual}.transformer", tower, spec.layers),
        Row("model.transformer", None),
        *(Row(f"model.{name}", None) for name in ("token_embedding", "positional_embedding")),
        *(Row(f"model.{name}", None) for name in ("ln_final", "text_projection", "attn_mask")),
        Row("model.logit_scale", None),
        *(Row(name, None) for name in ("mean", "std")),  # of pixels, in variations' files
    ]


# -- a whole file ---------------------------------------------------------------------------------

UNET, VAE, TEXT, UNCLIP_VISION = (
    "model.diffusion_model",
    "first_stage_model",
    "cond_stage_model",
    "embedder",
)
EMA = "model_ema"
STATISTICS = "noise_augmentor"
# What the training code registers beside its networks.
DROPPED = [
    Row(name, None)
    for name in (
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
        *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
        *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped"),
        *("posterior_mean_coef1", "posterior_mean_coef2"),
        *("logvar", "lvlb_weights", "scale_factor"),
        *(EMA, "depth_model", "low_scale_model", STATISTICS),
    )
]


def ema_name(name: str) -> str:
    """Where the training code keeps the moving average of ``model.…``: all dots removed.

    ``model.diffusion_model.out.2.bias`` is ``model_ema.diffusion_modelout2bias``.
    """
    return f"{EMA}.{name.removeprefix('model.').replace('.', '')}"


def file_rows(spec: ModelSpec, *, flat_text: bool = False) -> dict[str, list[Row]]:
    """Rows of a whole file by part (``unet vae text vision``, and ``""`` for the rest)."""
    parts: dict[str, tuple[str, list[Row]]] = {
        "unet": (UNET, unet_rows(spec.unet)),
        "vae": (VAE, vae_rows(spec.vae)),
    }
    if spec.text is not None:
        v2 = spec.unet.linear_projection
        text = flat_clip_text_rows if flat_text else clip_text_rows
        parts["text"] = (TEXT, (open_clip_text_rows if v2 else text)(spec.text))
    if spec.vision is not None:
        place = UNCLIP_VISION if spec.text else TEXT
        parts["vision"] = (place, open_clip_vision_rows(spec.vision))
    return {
        **{
            part: [row._replace(original=f"{prefix}.{row.original}") for row in rows]
            for part, (prefix, rows) in parts.items()
        },
        "": DROPPED,
    }


# -- both directions ------------------------------------------------------------------------------


class _Finder:
    """Finds the row of a parameter: the longest module path that leads to it."""

    def __init__(self, rows: Iterable[Row], key: Callable[[Row], Iterable[tuple[str, Row]]]):
        self.table = {name: row for r in rows for name, row in key(r)}

    def __call__(self, name: str) -> tuple[Row, str] | None:
        """The row and what follows it in ``name`` (``.weight``)."""
        head = name
        while head not in self.table:
            head, dot, _ = head.rpartition(".")
            if not dot:
                return None
        return self.table[head], name[len(head) :]


def to_published(state: StateDict, parts: dict[str, list[Row]]) -> dict[str, StateDict]:
    """Tensors of an original file by part, under their published names; nothing is read.

    Raises:
        WeightsError: names without a row, listed.
    """
    find = {part: _Finder(rows, lambda row: [(row.original, row)]) for part, rows in parts.items()}
    out: dict[str, dict[str, Entry]] = {part: {} for part in parts if part}
    unknown = []
    for name, entry in state.entries.items():
        found = next(((p, hit) for p in parts if (hit := find[p](name))), None)
        if found is None:
            unknown.append(name)
            continue
        part, (row, tail) = found
        if row.published is not None:
            out[part] |= _published_entries(row, tail, entry)
    if unknown:
        _refuse(state.file, unknown, "that no single-file layout of this family has")
    return {part: state.replace(entries) for part, entries in out.items()}


def to_original(
    states: dict[str, StateDict], parts: dict[str, list[Row]], file: Path
) -> dict[str, Entry]:
    """The reverse of :func:`to_published`, for the rows that are not dropped.

    Raises:
        WeightsError: names without a row, listed.
    """
    out: dict[str, Entry] = {}
    for part, state in states.items():
        find = _Finder(parts[part], _published_keys)
        unknown = []
        for name, entry in state.entries.items():
            found = find(name)
            if found is None:
                unknown.append(name)
                continue
            row, tail = found
            if row.change == "qkv":
                if ".q_proj." in name:  # the first of three makes all of it
                    names = [name.replace(".q_proj.", f".{x}_proj.") for x in "qkv"]
                    out[row.original] = _stack([state.entries[n] for n in names])
            else:
                out[row.original + tail] = _original_entry(row, entry)
        if unknown:
            _refuse(file, unknown, f"that the single-file layout has no place for ({part})")
    return out


def _published_keys(row: Row) -> Iterator[tuple[str, Row]]:
    if row.published is None:
        return
    names = [row.published.format(x) for x in "qkv"] if row.change == "qkv" else [row.published]
    for name in names:
        yield name, row


def _published_entries(row: Row, tail: str, entry: Entry) -> dict[str, Entry]:
    assert row.published is not None
    shape = entry.shape
    if row.change == "qkv":
        size = shape[0] // 3
        return {
            row.published.format(x): entry.derive(
                (size, *shape[1:]), lambda t, i=i: t[i * size : (i + 1) * size]
            )
            for i, x in enumerate("qkv")
        }
    if row.change == "transpose":
        entry = entry.derive(shape[::-1], lambda t: t.T)
    elif row.change == "square" and len(shape) == 4:
        entry = entry.derive(shape[:2], lambda t: t[:, :, 0, 0])
    return {row.published + tail: entry}


def _original_entry(row: Row, entry: Entry) -> Entry:
    shape = entry.shape
    if row.change == "transpose":
        return entry.derive(shape[::-1], lambda t: t.T)
    if row.change == "square" and len(shape) == 2:
        return entry.derive((*shape, 1, 1), lambda t: t[:, :, None, None])
    return entry


def _stack(three: Sequence[Entry]) -> Entry:
    def read() -> Tensor:
        return torch.cat([entry.read() for entry in three])

    shape = three[0].shape
    return three[0]._replace(shape=(3 * shape[0], *shape[1:]), read=read)


def _refuse(file: Path, names: list[str], what: str) -> None:
    listed = "; ".join(names[:8]) + ("; …" if len(names) > 8 else "")
    raise WeightsError(
        file, f"holds {len(names)} tensors {what}: {listed}.", "Is it of another family?"
    )
