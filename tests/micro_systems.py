"""Random models of every system of the family, of one micro size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from micro_models import MERGES, MICRO, VOCAB
from safelight import presets
from safelight.conditioning.prior import PriorModel
from safelight.generate import Generator
from safelight.model import Model
from safelight.nets.clip import TextTower, VisionTower
from safelight.nets.prior import Prior
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.spec import ModelSpec, VisionSpec
from safelight.text.tokenizer import Tokenizer

VISION = VisionSpec(
    image_size=8, patch_size=4, width=16, layers=1, heads=2, mlp_width=16, projection_width=16
)


def photo(width: int = 32, height: int = 32) -> Image.Image:
    values = np.random.default_rng(0).random((4, 4, 3)) * 255
    small = Image.fromarray(values.astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def half_mask(width: int = 32, height: int = 32) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def system_spec(family: str, **changes: Any) -> ModelSpec:
    unet = {
        "inpaint": {"in_channels": 9},
        "depth": {"in_channels": 5},
        "unclip": {"class_embedding": "projection", "class_embedding_size": 32},
        "x4-upscaler": {
            "in_channels": 7,
            "class_embedding": "table",
            "class_embedding_size": 400,
        },
    }.get(family, {})
    more: dict[str, Any] = {
        "unclip": {"vision": VISION, "noising": presets.NOISE_AUGMENTATION},
        "image-variations": {"vision": VISION, "text": None},
        "x4-upscaler": {
            "noising": presets.X4_NOISING,
            "vae": MICRO.vae.replace(channels=(8, 8, 16), force_float32=True),
        },
    }.get(family, {})
    return MICRO.replace(
        name=f"micro-{family}", family=family, unet=MICRO.unet.replace(**unet), **more, **changes
    )


def system(family: str, **changes: Any) -> Generator:
    made = system_spec(family, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = None
        if made.prior is not None:
            prior = PriorModel(
                made.prior, Prior(made.prior), TextTower(made.prior.text), tokenizer(made)
            )
        return Generator(
            Model(
                spec=made,
                unet=UNet(made.unet),
                vae=VAE(made.vae),
                text=TextTower(made.text) if made.text else None,
                vision=VisionTower(made.vision) if made.vision else None,
                tokenizer=tokenizer(made) if made.text else None,
                prior=prior,
            )
        )


def tokenizer(made: ModelSpec) -> Tokenizer:
    assert made.text is not None
    return Tokenizer.from_vocab(VOCAB, MERGES, context_length=made.text.context_length)
