"""The family at its sizes, derived by ``replace()``, never by repetition.

``full`` sizes are the published ones (see the model cards), ``tiny`` the ones that this project
trains and ships. Tests make their own micro models.
"""

from __future__ import annotations

from safelight.spec import (
    ModelSpec,
    PriorSpec,
    ScheduleSpec,
    TextSpec,
    UNetSpec,
    VAESpec,
    VisionSpec,
)

# -- full: the published sizes ----------------------------------------------------------------

CLIP_L_TEXT = TextSpec()
OPENCLIP_H_TEXT = TextSpec(
    width=1024, layers=23, heads=16, mlp_width=4096, activation="gelu", pad_id=0
)
CLIP_L_VISION = VisionSpec()
OPENCLIP_H_VISION = VisionSpec(
    width=1280, layers=32, heads=16, mlp_width=5120, activation="gelu", projection_width=1024
)

SD_V1 = ModelSpec(name="sd-v1", unet=UNetSpec(), vae=VAESpec(), text=CLIP_L_TEXT)
SD_SMALL = SD_V1.replace(name="small", unet=SD_V1.unet.replace(layers_per_block=1))

SD_V2_BASE = ModelSpec(
    name="sd-v2-base",
    family="sd-v2",
    unet=UNetSpec(context_width=1024, heads=(5, 10, 20, 20), linear_projection=True),
    vae=VAESpec(),
    text=OPENCLIP_H_TEXT,
    schedule=ScheduleSpec(sampler="ddim"),
)
SD_V2_768 = SD_V2_BASE.replace(
    name="sd-v2-768",
    unet=SD_V2_BASE.unet.replace(sample_size=96, upcast_attention=True),
    vae=VAESpec(sample_size=768),
    schedule=SD_V2_BASE.schedule.replace(prediction_type="v"),
)
# Inputs beside the latents: 1 mask plane and the masked picture's 4; 1 depth plane.
SD_V1_INPAINT = SD_V1.replace(
    name="sd-v1-inpaint", family="inpaint", unet=SD_V1.unet.replace(in_channels=9)
)
SD_V2_INPAINT = SD_V2_BASE.replace(
    name="sd-v2-inpaint", family="inpaint", unet=SD_V2_BASE.unet.replace(in_channels=9)
)
SD_V2_DEPTH = SD_V2_BASE.replace(
    name="sd-v2-depth", family="depth", unet=SD_V2_BASE.unet.replace(in_channels=5)
)
IMAGE_VARIATIONS = SD_V1.replace(
    name="image-variations", family="image-variations", text=None, vision=CLIP_L_VISION
)
NOISE_AUGMENTATION = ScheduleSpec(
    kind="squared_cosine", beta_start=0.0001, beta_end=0.02, sampler="ddpm", steps_offset=0
)
"""Of unCLIP's picture embeddings."""
UNCLIP_H = SD_V2_768.replace(
    name="unclip-h",
    family="unclip",
    unet=SD_V2_768.unet.replace(class_embedding="projection", class_embedding_size=2048),
    vision=OPENCLIP_H_VISION,
    noising=NOISE_AUGMENTATION,
    steps=20,
    guidance_scale=10.0,
)
UNCLIP_L = UNCLIP_H.replace(
    name="unclip-l",
    unet=UNCLIP_H.unet.replace(class_embedding_size=1536),
    vision=CLIP_L_VISION,
)
UNCLIP_L_PRIOR = UNCLIP_L.replace(name="unclip-l-prior", prior=PriorSpec())
"""With Karlo's prior in front: from text alone."""
X4_UNET = UNetSpec(
    sample_size=128,
    in_channels=7,
    channels=(256, 512, 512, 1024),
    attention=(False, True, True, True),
    only_cross_attention=(True, True, True, False),
    context_width=1024,
    linear_projection=True,
    class_embedding="table",
    class_embedding_size=1000,
)
X4_VAE = VAESpec(channels=(128, 256, 512), scaling_factor=0.08333, force_float32=True)
X4_NOISING = ScheduleSpec(beta_start=0.0001, beta_end=0.02, sampler="ddpm", steps_offset=0)
"""Of the upscaler's small picture."""
X4_UPSCALER = ModelSpec(
    name="x4-upscaler",
    family="x4-upscaler",
    unet=X4_UNET,
    vae=X4_VAE,
    text=OPENCLIP_H_TEXT,
    schedule=X4_NOISING.replace(prediction_type="v", sampler="ddim", steps_offset=1),
    noising=X4_NOISING,
    steps=75,
    guidance_scale=9.0,
)

# -- tiny: trained on still life and shipped ---------------------------------------------------

TINY_TEXT = TextSpec(
    vocab_size=684,
    width=128,
    layers=4,
    heads=4,
    mlp_width=512,
    context_length=32,
    projection_width=128,
    bos_id=682,
    eos_id=683,
    pad_id=683,
)
TINY_VISION = VisionSpec(
    image_size=64, patch_size=8, width=128, layers=4, heads=4, mlp_width=512, projection_width=128
)
TINY_VAE = VAESpec(
    channels=(16, 32, 64, 128),
    layers_per_block=1,
    scaling_factor=0.6569,
    sample_size=128,
    norm_groups=8,
)
TINY_UNET = UNetSpec(
    sample_size=16,
    channels=(64, 128),
    attention=(True, True),
    heads=(2, 4),
    only_cross_attention=(False, False),
    layers_per_block=1,
    context_width=128,
    norm_groups=16,
)
TINY = ModelSpec(
    name="tiny",
    unet=TINY_UNET,
    vae=TINY_VAE,
    text=TINY_TEXT,
    vision=TINY_VISION,
    schedule=ScheduleSpec(sampler="dpm++2m"),
    steps=25,
    guidance_scale=4.0,
)
TINY_V = TINY.replace(
    name="tiny-v", schedule=TINY.schedule.replace(prediction_type="v"), guidance_scale=3.0
)
