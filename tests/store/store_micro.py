"""Micro models with random weights, made by the reference libraries."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)


def byte_vocab() -> dict[str, int]:
    """CLIP's 512 byte symbols and the two specials."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = 256 - len(printable)
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(moved)]
    tokens = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


def make_unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(1)
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **changes}).eval()


def make_vae(**changes) -> AutoencoderKL:
    torch.manual_seed(2)
    config = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**{**config, **changes}).eval()


def make_text(**changes) -> CLIPTextModel:
    torch.manual_seed(3)
    config = {
        "vocab_size": 514,
        "hidden_size": 12,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        # The wrong values that published configs carry.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    return CLIPTextModel(CLIPTextConfig(**{**config, **changes})).eval()


def make_vision(**changes) -> CLIPVisionModelWithProjection:
    torch.manual_seed(4)
    config = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 12,
    }
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**{**config, **changes})).eval()


def make_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    return CLIPTokenizer(vocab=byte_vocab(), merges=[], model_max_length=16, pad_token=pad)


def make_pipeline(scheduler=None, **unet) -> StableDiffusionPipeline:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return StableDiffusionPipeline(
        unet=make_unet(**unet),
        vae=make_vae(),
        text_encoder=make_text(),
        tokenizer=make_tokenizer(),
        scheduler=scheduler or PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
