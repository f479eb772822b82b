"""Original single files (``.ckpt``, ``.safetensors``): which model one is, reading, writing."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from safelight import presets
from safelight.errors import InvalidRequest, WeightsError
from safelight.spec import ModelSpec, TextSpec
from safelight.store import configs, keymaps
from safelight.store.clip_stats import identity, read_clip_stats
from safelight.store.folder import FolderContents
from safelight.store.hub import clip_tokenizer, packaged_tokenizer
from safelight.store.weights import Entry, StateDict, read_weights, save_safetensors

log = logging.getLogger(__name__)

Prediction = Literal["epsilon", "v"]
# The training step tells the two kinds of v2 apart, which the weights do not.
_BASE_V2_STEP, _V2_1_STEP = 875000, 110000
_EMA_AT_LEAST = 100
SPEC_KEY = "safelight.spec"
"""In the metadata of files that this package wrote: its spec, as JSON."""
# Width of its embeddings. OpenCLIP H's (1024) have no statistics.
_CLIP_L = 768
_TOKENIZER = (
    "Give --tokenizer FOLDER with vocab.json and merges.txt (the folder tokenizer/ of any Stable "
    "Diffusion on the hub, or openai/clip-vit-large-patch14), or pip install open_clip_torch."
)
FAMILIES = ("sd-v1", "sd-v2", "image-variations", "unclip", "inpaint", "depth", "x4-upscaler")


def read_single_file(
    path: str | Path,
    *,
    spec: ModelSpec | None = None,
    ema: bool | None = None,
    prediction_type: Prediction | None = None,
    family: str | None = None,
    layers: int | None = None,
    tokenizer: str | Path | None = None,
    clip_stats: str | Path | None = None,
) -> FolderContents:
    """Read an original checkpoint; nothing of it is in memory yet.

    Args:
        path: the file; pickles go through :mod:`safelight.store.pickles`.
        spec: what the networks are; None: what :func:`write_single_file` noted, else told from
            the weights (:func:`detect`).
        ema: take the moving average of the UNet's weights, which is for inference, or the last
            ones, which are to train on. None: the average where the file has one.
        prediction_type: what the UNet predicts, where the file cannot say (v2).
        family: what to take the file for, instead of what it looks like.
        layers: residual layers a level, instead of what the names say.
        tokenizer: a tokenizer's folder, or CLIP's ``bpe_simple_vocab_16e6.txt.gz``; single files
            hold none. None: CLIP's from the local hub cache or an installed package.
        clip_stats: mean and std of the picture embeddings (unCLIP on CLIP L).

    Returns:
        the same as a folder gives.

    Raises:
        WeightsError: broken, of another family, or with tensors that no row of
            :mod:`safelight.store.keymaps` knows.
        InvalidRequest: an override makes no sense, or unCLIP on CLIP L comes without statistics.
    """
    if family is not None and family not in FAMILIES:
        raise InvalidRequest("family", f"{family!r} is unknown.", f"One of {', '.join(FAMILIES)}.")
    if prediction_type not in (None, "epsilon", "v"):
        raise InvalidRequest("prediction_type", f"{prediction_type!r}.", "epsilon or v.")
    state = read_weights(path)
    path = state.file
    notes: list[str] = []
    state = _without_aliases(state)
    if spec is None:
        spec = read_own_spec(state, prediction_type, layers)
    if spec is None:
        spec, notes = detect(state, prediction_type, layers)
    elif prediction_type is not None:
        spec = spec.replace(schedule=spec.schedule.replace(prediction_type=prediction_type))
    if family is not None:
        spec = spec.replace(family=family)
    statistics = _statistics(state, spec, clip_stats)
    averaged = sum(name.startswith(f"{keymaps.EMA}.") for name in state) > _EMA_AT_LEAST
    if ema and not averaged:
        raise InvalidRequest("ema", f"{path} has no moving average.", "Leave ema out.")
    if averaged and ema is not False:
        state = _averaged(state)
        notes.append("took the moving average (EMA) of the UNet's weights")
    flat = f"{keymaps.TEXT}.transformer.final_layer_norm.weight" in state
    tensors = keymaps.to_published(state, keymaps.file_rows(spec, flat_text=flat))
    if statistics is not None:
        tensors["image_normalizer"] = statistics
    if spec.text is not None and tokenizer is None:
        tokenizer = clip_tokenizer(spec.text.pad_id) or packaged_tokenizer()
    for note in notes:
        log.warning("%s: %s", path, note)
    place = None if tokenizer is None else Path(tokenizer)
    if place is not None and not place.exists():
        raise InvalidRequest("tokenizer", f"no file or folder {place}.", _TOKENIZER)
    return FolderContents(path, spec, tensors, place, notes=tuple(notes))


def no_tokenizer(path: Path) -> InvalidRequest:
    """The error for a single file whose model reads text, where no vocabulary is at hand."""
    problem = f"{path.name} holds none, and neither the hub cache nor an installed package has one."
    return InvalidRequest("tokenizer", problem, _TOKENIZER)


def _statistics(
    state: StateDict, spec: ModelSpec, clip_stats: str | Path | None
) -> StateDict | None:
    """Of unCLIP's picture embeddings.

    Raises:
        InvalidRequest: they are needed, and are neither given nor in the file.
    """
    if spec.family != "unclip":
        if clip_stats is not None:
            raise InvalidRequest("clip_stats", f"a {spec.family} has no use for them.")
        return None
    width = spec.unet.class_embedding_size // 2
    if clip_stats is not None:
        return read_clip_stats(clip_stats, width)
    inside = {n: state.entries.get(f"{keymaps.STATISTICS}.data_{n}") for n in ("mean", "std")}
    found = {n: e for n, e in inside.items() if e is not None}
    if len(found) == 2:
        return state.replace(found)
    if width == _CLIP_L:
        raise InvalidRequest(
            "clip_stats",
            f"{state.file.name} is unCLIP on CLIP L, which needs its embeddings' mean and std.",
            "Give --clip-stats ViT-L-14_stats.th: Karlo's file, published beside its checkpoints.",
        )
    return identity(width, state.file)


def write_single_file(
    path: str | Path,
    spec: ModelSpec,
    state_dicts: Mapping[str, Mapping[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write one ``.safetensors`` file in the original layout.

    v2 files hold a last text layer that no model uses. It is written as a copy of the layer
    before it, which readers skip.

    Args:
        path: the file.
        spec: what the networks are.
        state_dicts: ``unet vae text vision`` and ``image_normalizer``, under published names.
        dtype: floating-point tensors are converted to it; None keeps theirs.

    Raises:
        WeightsError: tensors that the layout has no place for.
    """
    path = Path(path)
    states = {part: StateDict.of(state) for part, state in state_dicts.items()}
    statistics = states.pop("image_normalizer", None)
    entries = keymaps.to_original(states, keymaps.file_rows(spec), path)
    if spec.text is not None and spec.unet.linear_projection and "text" in states:
        entries |= _unused_text(entries, spec.text)
    if statistics is not None:
        # The original has no place for them; other readers pass over these names.
        for name, entry in statistics.entries.items():
            entries[f"{keymaps.STATISTICS}.data_{name}"] = entry
    entries = {name: entry.cast(dtype) for name, entry in entries.items()}
    notes = {SPEC_KEY: spec.model_dump_json(exclude_defaults=True)}
    save_safetensors(path, StateDict(entries, path), notes)


def read_own_spec(
    state: StateDict, prediction_type: Prediction | None = None, layers: int | None = None
) -> ModelSpec | None:
    """What the file says of itself, where this package wrote it.

    Raises:
        WeightsError: it says nonsense.
    """
    text = state.extra.get(SPEC_KEY)
    if not isinstance(text, str):
        return None
    try:
        spec = ModelSpec.model_validate_json(text)
    except (ValueError, ArithmeticError) as error:
        raise WeightsError(state.file, f"its metadata {SPEC_KEY} is no spec: {error}.") from error
    configs.sane(spec, state.file)
    if prediction_type is not None:
        spec = spec.replace(schedule=spec.schedule.replace(prediction_type=prediction_type))
    return spec.replace(unet=spec.unet.replace(layers_per_block=layers)) if layers else spec


def read_vae_file(path: str | Path, spec: ModelSpec) -> StateDict:
    """A separate autoencoder (the ``ft-mse`` kind), to replace a model's own.

    Accepts the original names, with or without ``first_stage_model.``, and the published ones.
    """
    state = _without_aliases(read_weights(path))
    if any(".mid_block." in name for name in state):
        from safelight.store.components import modern_attention

        return modern_attention(state)
    rows = keymaps.vae_rows(spec.vae)
    inside = state.under(f"{keymaps.VAE}.")
    return keymaps.to_published(inside if len(inside) else state, {"vae": rows})["vae"]


def detect(
    state: StateDict, prediction_type: Prediction | None = None, layers: int | None = None
) -> tuple[ModelSpec, list[str]]:
    """Which model of the family an original file is, from names and shapes.

    Args:
        state: the file's tensors under their original names.
        prediction_type: overrides what v2 files leave open.
        layers: overrides the number of residual layers a level.

    Returns:
        its spec and notes about what had to be guessed.

    Raises:
        WeightsError: it is not of this family; says what it looks like.
    """
    unet = f"{keymaps.UNET}."
    first = state.entries.get(f"{unet}input_blocks.0.0.weight")
    if first is None or len(first.shape) != 4:
        raise WeightsError(state.file, f"is not an original checkpoint: {guess(state)}.")
    width = _context_width(state)
    blocks = {n.split(".")[3] for n in state if n.startswith(f"{unet}input_blocks.")}
    layers = layers or (len(blocks) - 4) // 4
    in_channels = first.shape[1]
    label = state.entries.get(f"{unet}label_emb.0.0.weight")
    label = label if label is not None and len(label.shape) == 2 else None
    notes: list[str] = []
    if any(n.startswith("conditioner.") for n in state) or width not in (768, 1024):
        raise WeightsError(state.file, f"has a context {width} wide: {guess(state)}.")

    name = state.file.stem
    if width == 768:
        spec = presets.SD_V1
        if f"{keymaps.TEXT}.model.visual.proj" in state:
            spec = spec.replace(family="image-variations", text=None, vision=presets.CLIP_L_VISION)
        elif in_channels == 9:
            spec = spec.replace(family="inpaint")
    elif f"{unet}label_emb.weight" in state:
        spec = presets.SD_V2_BASE.replace(
            family="x4-upscaler",
            unet=presets.X4_UNET,
            vae=presets.X4_VAE,
            steps=75,
            guidance_scale=9.0,
            schedule=presets.SD_V2_BASE.schedule.replace(
                beta_start=0.0001, beta_end=0.02, prediction_type="v"
            ),
        )
    elif label is not None:
        vision = presets.OPENCLIP_H_VISION if label.shape[1] == 2048 else presets.CLIP_L_VISION
        there = f"{keymaps.UNCLIP_VISION}.model.visual.proj" in state
        spec = presets.UNCLIP_H.replace(
            unet=presets.UNCLIP_H.unet.replace(class_embedding_size=label.shape[1]),
            vision=vision if there else None,
        )
        if not there:
            notes.append("holds no image encoder: load one beside it")
    else:
        kinds = {5: "depth", 9: "inpaint"}
        spec, notes = _base_or_768(state, prediction_type, in_channels)
        spec = spec.replace(family=kinds.get(in_channels, "sd-v2"))
    if prediction_type is not None:
        spec = spec.replace(schedule=spec.schedule.replace(prediction_type=prediction_type))
    unet = spec.unet.replace(in_channels=in_channels, layers_per_block=layers)
    return spec.replace(name=name, unet=unet), notes


def _base_or_768(
    state: StateDict, prediction_type: Prediction | None, in_channels: int
) -> tuple[ModelSpec, list[str]]:
    """v2 at 512 predicts the noise, at 768 the velocity; only the training step tells."""
    step = state.extra.get("global_step")
    if in_channels != 4 or prediction_type == "epsilon" or step == _BASE_V2_STEP:
        return presets.SD_V2_BASE, []
    if prediction_type == "v" or step == _V2_1_STEP:
        return presets.SD_V2_768, []
    guess = "taken for the 768-pixel v2, which predicts v; say prediction_type=epsilon if it is not"
    return presets.SD_V2_768, [guess]


def _context_width(state: StateDict) -> int:
    pattern = re.compile(
        rf"{re.escape(keymaps.UNET)}\.input_blocks\.\d+\.1"
        r"\.transformer_blocks\.0\.attn2\.to_k\.weight"
    )
    found = (e for n, e in state.entries.items() if pattern.fullmatch(n) and len(e.shape) == 2)
    return next((entry.shape[1] for entry in found), 0)


def guess(state: StateDict) -> str:
    """What a file that is not ours may be, for messages."""
    signs = {
        "conditioner.": "it looks like SDXL",
        "joint_blocks.": "it looks like SD 3",
        "model.diffusion_model.joint_blocks.": "it looks like SD 3",
        "double_blocks.": "it looks like Flux",
        "control_model.": "it looks like a ControlNet",
        "lora_": "it looks like a LoRA; give it with the model that it changes",
        "down_blocks.": "it looks like one component of a published folder",
        "encoder.": "it looks like an autoencoder alone",
        "first_stage_model.": "it holds no UNet",
    }
    for prefix, guess in signs.items():
        if any(name.startswith(prefix) for name in state):
            return guess
    return f"its tensors are named like {next(iter(state), 'nothing')}"


def _without_aliases(state: StateDict) -> StateDict:
    """Community spellings of the parts' prefixes, as the original ones."""
    vae = any(name.startswith("vae.") for name in state)
    return state.renamed(
        lambda name: f"{keymaps.VAE}.{name[4:]}" if vae and name.startswith("vae.") else name
    )


def _averaged(state: StateDict) -> StateDict:
    """The UNet's weights replaced by their moving averages.

    Raises:
        WeightsError: one has no average.
    """
    entries = dict(state.entries)
    for name in state:
        if name.startswith(f"{keymaps.UNET}."):
            average = keymaps.ema_name(name)
            if average not in entries:
                raise WeightsError(state.file, f"lacks {average}, the moving average of {name}.")
            entries[name] = entries[average]
    return state.replace(entries)


def _unused_text(entries: Mapping[str, Entry], spec: TextSpec) -> dict[str, Entry]:
    """What readers of v2 files expect and do not use."""
    last = f"{keymaps.TEXT}.model.transformer.resblocks.{spec.layers - 1}."
    new = f"{keymaps.TEXT}.model.transformer.resblocks.{spec.layers}."
    like = entries[f"{keymaps.TEXT}.model.positional_embedding"]
    square = (spec.width, spec.width)
    return {
        **{new + n[len(last) :]: e for n, e in entries.items() if n.startswith(last)},
        f"{keymaps.TEXT}.model.text_projection": like._replace(
            shape=square, read=lambda: torch.ones(square, dtype=like.dtype)
        ),
        f"{keymaps.TEXT}.model.logit_scale": like._replace(
            shape=(), read=lambda: torch.ones((), dtype=like.dtype)
        ),
    }
