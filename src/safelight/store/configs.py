"""Published ``config.json`` files of the networks, to specs and back.

A key that is absent means the class default of the reference library. A key that changes the
mathematics in a way that no spec can say is an error; a key that nobody knows is ignored, with
a note in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from safelight.errors import WeightsError
from safelight.spec import Record, TextSpec, UNetSpec, VAESpec, VisionSpec

log = logging.getLogger(__name__)

Config = Mapping[str, Any]


def words(text: str) -> frozenset[str]:
    """A set of names, written as a line of text."""
    return frozenset(text.split())


# Keys that one value only is supported for: any other changes the mathematics.
_UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "transformer_layers_per_block": (1,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "addition_embed_type": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
}
_UNET_READ = words(
    "sample_size in_channels out_channels down_block_types up_block_types block_out_channels "
    "only_cross_attention layers_per_block norm_num_groups norm_eps cross_attention_dim "
    "attention_head_dim num_attention_heads use_linear_projection class_embed_type "
    "num_class_embeds projection_class_embeddings_input_dim upcast_attention time_cond_proj_dim "
    "dropout addition_time_embed_dim addition_embed_type_num_heads"
)
_VAE_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "shift_factor": (None, 0),
    "latents_mean": (None,),
    "latents_std": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
}
_VAE_READ = words(
    "in_channels out_channels latent_channels block_out_channels layers_per_block sample_size "
    "scaling_factor norm_num_groups down_block_types up_block_types force_upcast"
)
_TEXT_READ = words(
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
    "max_position_embeddings hidden_act layer_norm_eps projection_dim bos_token_id eos_token_id "
    "pad_token_id"
)
_TEXT_FIXED: dict[str, tuple[Any, ...]] = {"use_attention_mask": (None, False)}
_VISION_READ = words(
    "image_size patch_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
    "hidden_act layer_norm_eps projection_dim"
)
_VISION_FIXED: dict[str, tuple[Any, ...]] = {"num_channels": (3,)}
# What transformers writes into every config: nothing that a forward pass depends on.
_NEUTRAL = words(
    "add_cross_attention architectures attention_dropout bad_words_ids begin_suppress_tokens "
    "bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id "
    "diversity_penalty do_sample dropout dtype early_stopping encoder_no_repeat_ngram_size "
    "eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id "
    "forced_eos_token_id gradient_checkpointing id2label initializer_factor initializer_range "
    "is_decoder is_encoder_decoder label2id length_penalty logit_scale_init_value max_length "
    "min_length model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences output_attentions output_hidden_states output_scores pad_token_id "
    "prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict "
    "return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature "
    "tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p "
    "torch_dtype torchscript transformers_version typical_p use_bfloat16"
)
# transformers' default end-of-text id; published configs carry it although the token is 49407.
_LEGACY_EOS = 2


def check(
    config: Config, file: Path, read: Iterable[str], fixed: Mapping[str, tuple[Any, ...]]
) -> None:
    """Refuse values that are not supported; note keys that are not known.

    Raises:
        WeightsError: names the key, its value and what is supported.
    """
    for key, allowed in fixed.items():
        if key in config and _plain(config[key]) not in allowed:
            raise WeightsError(
                file,
                f"{key} = {config[key]!r} is not supported (only {allowed[0]!r} is).",
                "The model is of another family.",
            )
    known = {*read, *fixed, *_NEUTRAL}
    unknown = sorted(k for k in config if k not in known and not k.startswith("_"))
    if unknown:
        log.warning("%s: ignored unknown keys: %s", file, ", ".join(unknown))


def unet_spec(config: Config, file: Path) -> UNetSpec:
    """A ``UNet2DConditionModel`` config.

    Raises:
        WeightsError: the network is not one of this family; names the key.
    """
    check(config, file, _UNET_READ, _UNET_FIXED)
    channels = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
    levels = len(channels)
    down = config.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    attention = _attention(file, "down_block_types", down, "DownBlock2D")
    up = config.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    if _attention(file, "up_block_types", up, "UpBlock2D") != attention[::-1]:
        raise WeightsError(file, "up_block_types is not down_block_types mirrored.")

    # The published name says head width, but the value is the number of heads.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    cross = config.get("only_cross_attention", False)
    kind, size = _class_embedding(config, file)
    sample_size = _one(file, "sample_size", config.get("sample_size") or 64)
    if sample_size < 64 and _older_than_0_9(config):
        sample_size = 64  # files of that time carry the training code's unused value
    return _build(
        UNetSpec,
        file,
        sample_size=sample_size,
        in_channels=config.get("in_channels", 4),
        out_channels=config.get("out_channels", 4),
        channels=channels,
        attention=attention,
        heads=tuple(heads) if isinstance(heads, list | tuple) else (heads,) * levels,
        layers_per_block=_one(file, "layers_per_block", config.get("layers_per_block", 2)),
        context_width=_one(file, "cross_attention_dim", config.get("cross_attention_dim", 1280)),
        linear_projection=config.get("use_linear_projection", False),
        only_cross_attention=tuple(cross) if isinstance(cross, list) else (cross,) * levels,
        upcast_attention=bool(config.get("upcast_attention")),
        class_embedding=kind,
        class_embedding_size=size,
        guidance_embedding_size=config.get("time_cond_proj_dim") or 0,
        norm_groups=config.get("norm_num_groups", 32),
        norm_eps=config.get("norm_eps", 1e-5),
    )


def unet_config(spec: UNetSpec) -> dict[str, Any]:
    """The ``UNet2DConditionModel`` config of a spec, every key that matters spelled out."""
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in spec.attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(spec.attention)]
    heads = set(spec.heads)
    projection = spec.class_embedding == "projection"
    table = spec.class_embedding == "table"
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": spec.heads[0] if len(heads) == 1 else list(spec.heads),
        "block_out_channels": list(spec.channels),
        "center_input_sample": False,
        "class_embed_type": "projection" if projection else None,
        "cross_attention_dim": spec.context_width,
        "down_block_types": down,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": spec.in_channels,
        "layers_per_block": spec.layers_per_block,
        "mid_block_scale_factor": 1,
        "norm_eps": spec.norm_eps,
        "norm_num_groups": spec.norm_groups,
        "num_class_embeds": spec.class_embedding_size if table else None,
        "only_cross_attention": (
            list(spec.only_cross_attention) if any(spec.only_cross_attention) else False
        ),
        "out_channels": spec.out_channels,
        "projection_class_embeddings_input_dim": spec.class_embedding_size if projection else None,
        "sample_size": spec.sample_size,
        "time_cond_proj_dim": spec.guidance_embedding_size or None,
        "up_block_types": up,
        "upcast_attention": spec.upcast_attention,
        "use_linear_projection": spec.linear_projection,
    }


def vae_spec(config: Config, file: Path) -> VAESpec:
    """An ``AutoencoderKL`` config.

    ``force_upcast`` is read for the autoencoders of the upscaler's shape (f = 4) only: the
    others' pipelines have never looked at it.

    Raises:
        WeightsError: the network is not one of this family; names the key.
    """
    check(config, file, _VAE_READ, _VAE_FIXED)
    channels = tuple(config.get("block_out_channels", (64,)))
    for key, block in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        types = config.get(key, [block])
        if list(types) != [block] * len(channels):
            raise WeightsError(file, f"{key} = {types} is not supported (only {block} is).")
    in_channels = config.get("in_channels", 3)
    if config.get("out_channels", 3) != in_channels:
        raise WeightsError(file, "out_channels differs from in_channels.")
    return _build(
        VAESpec,
        file,
        in_channels=in_channels,
        latent_channels=config.get("latent_channels", 4),
        channels=channels,
        layers_per_block=config.get("layers_per_block", 1),
        scaling_factor=config.get("scaling_factor", 0.18215),
        sample_size=_one(file, "sample_size", config.get("sample_size", 32)),
        norm_groups=config.get("norm_num_groups", 32),
        force_float32=len(channels) == 3 and config.get("force_upcast", True),
    )


def vae_config(spec: VAESpec) -> dict[str, Any]:
    """The ``AutoencoderKL`` config of a spec."""
    if spec.norm_eps != 1e-6:
        raise ValueError(f"norm_eps = {spec.norm_eps}: the published layout has 1e-6 built in")
    levels = len(spec.channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(spec.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": spec.force_float32,
        "in_channels": spec.in_channels,
        "latent_channels": spec.latent_channels,
        "layers_per_block": spec.layers_per_block,
        "norm_num_groups": spec.norm_groups,
        "out_channels": spec.in_channels,
        "sample_size": spec.sample_size,
        "scaling_factor": spec.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_spec(config: Config, file: Path, *, projection_width: int = 0) -> TextSpec:
    """A ``CLIPTextModel`` or ``CLIPTextModelWithProjection`` config.

    Args:
        config: its own, or the ``text_config`` of a whole ``CLIPModel``.
        file: named in errors.
        projection_width: rows of the projection that the weights hold. The config cannot say:
            towers without one carry ``projection_dim`` too.

    Raises:
        WeightsError: the network is not one of this family; names the key.
    """
    check(config, file, _TEXT_READ, _TEXT_FIXED)
    vocab_size = config.get("vocab_size", 49408)
    bos, eos = config.get("bos_token_id", 49406), config.get("eos_token_id", 49407)
    if eos == _LEGACY_EOS or eos >= vocab_size:
        bos, eos = vocab_size - 2, vocab_size - 1
    pad = config.get("pad_token_id", 1)
    return _build(
        TextSpec,
        file,
        vocab_size=vocab_size,
        width=config.get("hidden_size", 512),
        layers=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", 8),
        mlp_width=config.get("intermediate_size", 2048),
        context_length=config.get("max_position_embeddings", 77),
        activation=_activation(config, file),
        norm_eps=config.get("layer_norm_eps", 1e-5),
        projection_width=projection_width,
        bos_id=bos,
        eos_id=eos,
        # 1 is transformers' default, and no published tokenizer's padding.
        pad_id=eos if pad in (1, None) else pad,
    )


def text_config(spec: TextSpec) -> dict[str, Any]:
    """The config of a text tower; with a projection it names that class."""
    kind = "CLIPTextModelWithProjection" if spec.projection_width else "CLIPTextModel"
    return {
        "architectures": [kind],
        "attention_dropout": 0.0,
        "bos_token_id": spec.bos_id,
        "eos_token_id": spec.eos_id,
        "hidden_act": spec.activation,
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp_width,
        "layer_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.context_length,
        "model_type": "clip_text_model",
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "pad_token_id": spec.pad_id,
        "projection_dim": spec.projection_width or spec.width,
        "vocab_size": spec.vocab_size,
    }


def vision_spec(config: Config, file: Path) -> VisionSpec:
    """A ``CLIPVisionModelWithProjection`` config, or that of a whole ``CLIPModel``.

    Raises:
        WeightsError: the network is not one of this family; names the key.
    """
    if "vision_config" in config:
        # Old files hold the same a second time under "vision_config_dict".
        nested = config["vision_config"] or config.get("vision_config_dict") or {}
        config = {**nested, "projection_dim": config.get("projection_dim", 512)}
    check(config, file, _VISION_READ, _VISION_FIXED)
    return _build(
        VisionSpec,
        file,
        image_size=config.get("image_size", 224),
        patch_size=config.get("patch_size", 32),
        width=config.get("hidden_size", 768),
        layers=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", 12),
        mlp_width=config.get("intermediate_size", 3072),
        activation=_activation(config, file),
        norm_eps=config.get("layer_norm_eps", 1e-5),
        projection_width=config.get("projection_dim", 512),
    )


def vision_config(spec: VisionSpec) -> dict[str, Any]:
    """The ``CLIPVisionModelWithProjection`` config of a spec."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "attention_dropout": 0.0,
        "hidden_act": spec.activation,
        "hidden_size": spec.width,
        "image_size": spec.image_size,
        "intermediate_size": spec.mlp_width,
        "layer_norm_eps": spec.norm_eps,
        "model_type": "clip_vision_model",
        "num_attention_heads": spec.heads,
        "num_channels": 3,
        "num_hidden_layers": spec.layers,
        "patch_size": spec.patch_size,
        "projection_dim": spec.projection_width,
    }


def _class_embedding(config: Config, file: Path) -> tuple[str, int]:
    kind, rows = config.get("class_embed_type"), config.get("num_class_embeds")
    if kind == "projection":
        return "projection", config.get("projection_class_embeddings_input_dim") or 0
    if kind is not None:
        raise WeightsError(file, f"class_embed_type = {kind!r} is not supported.")
    return ("table", rows) if rows else ("none", 0)


def _attention(file: Path, key: str, types: Iterable[str], plain: str) -> tuple[bool, ...]:
    types = tuple(types)
    if not all(t in (plain, f"CrossAttn{plain}") for t in types):
        raise WeightsError(file, f"{key} = {list(types)} is not supported.")
    return tuple(t != plain for t in types)


def _activation(config: Config, file: Path) -> str:
    name = config.get("hidden_act", "quick_gelu")
    if name not in ("quick_gelu", "gelu"):
        raise WeightsError(file, f"hidden_act = {name!r} is not supported.")
    return name


def _one(file: Path, key: str, value: Any) -> int:
    """A value that files may give once a level or once a side."""
    values = set(value) if isinstance(value, list | tuple) else {value}
    if len(values) != 1 or not isinstance(first := values.pop(), int):
        raise WeightsError(file, f"{key} = {value!r} is not supported: expected one number.")
    return first


def _plain(value: Any) -> Any:
    """A list that repeats one value (a level) says no more than the value."""
    return value[0] if isinstance(value, list) and value == value[:1] * len(value) != [] else value


def _older_than_0_9(config: Config) -> bool:
    """False where the file does not say which version of diffusers wrote it."""
    parts = str(config.get("_diffusers_version", "")).split(".")[:2]
    return all(part.isdigit() for part in parts) and tuple(map(int, parts)) < (0, 9)


_MAX_LAYERS, _MAX_NUMBER, _MAX_LEVELS = 256, 2**21, 16


def sane(record: Record, file: Path) -> None:
    """Refuse numbers that no network of this family has: they would only cost time and memory.

    Raises:
        WeightsError: names the field.
    """
    for name, value in dict(record).items():
        if isinstance(value, Record):
            sane(value, file)
            continue
        values = value if isinstance(value, tuple) else (value,)
        numbers = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
        most = _MAX_LAYERS if "layers" in name else _MAX_NUMBER
        levels = name in ("channels", "heads", "attention", "only_cross_attention")
        too_many = levels and len(values) > _MAX_LEVELS
        if too_many or any(not -1 <= number <= most for number in numbers):
            raise WeightsError(file, f"{name} = {str(value)[:60]} is absurd.")


def _build(kind: Any, file: Path, **fields: Any) -> Any:
    try:
        made = kind(**fields)
        sane(made, file)
        return made
    except ArithmeticError as error:
        raise WeightsError(file, f"holds numbers that make no network: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "config"
        raise WeightsError(file, f"{name}: {first['msg']}.") from error
