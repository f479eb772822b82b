"""The reference's pipeline of every system, at micro size with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    PriorTransformer,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableUnCLIPImg2ImgPipeline,
    StableUnCLIPPipeline,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModelWithProjection,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessorPil,
)

from safelight.diffusion import grid, noise
from safelight.model import Model
from systems_micro import (
    make_text,
    make_tokenizer,
    make_unet,
    make_vae,
    make_vision,
    schedulers,
)

WIDTH = 12  # of picture embeddings
CLIP = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
NOISING = {"beta_schedule": "squaredcos_cap_v2"}
UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def parts(
    sampler: str, *, prediction: str = "epsilon", v2: bool = False, **unet: Any
) -> dict[str, Any]:
    """What every pipeline with a prompt has.

    Args:
        v2: linear projections, heads by level, and a tower and padding as OpenCLIP's.
    """
    if v2:
        unet = {"use_linear_projection": True, "attention_head_dim": [2, 4], **unet}
    return {
        "unet": make_unet(**unet),
        "vae": make_vae(),
        "text_encoder": make_text(hidden_act="gelu") if v2 else make_text(),
        "tokenizer": make_tokenizer("!") if v2 else make_tokenizer(),
        "scheduler": schedulers(prediction_type=prediction)[sampler],
    }


def text_pipeline(sampler: str, **options: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(**parts(sampler, **options), **UNCHECKED)


def img2img_pipeline(sampler: str) -> StableDiffusionImg2ImgPipeline:
    return StableDiffusionImg2ImgPipeline(**parts(sampler), **UNCHECKED)


def inpaint_pipeline(
    sampler: str, channels: int, v2: bool = False
) -> StableDiffusionInpaintPipeline:
    made = parts(sampler, in_channels=channels, v2=v2)
    return StableDiffusionInpaintPipeline(**made, **UNCHECKED)


def depth_estimator() -> tuple[DPTForDepthEstimation, DPTImageProcessorPil]:
    """And what prepares pictures for it."""
    torch.manual_seed(8)
    estimator = DPTForDepthEstimation(
        DPTConfig(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=384,
            patch_size=32,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 8, 8],
            reassemble_factors=[4, 2, 1, 0.5],
            fusion_hidden_size=8,
        )
    ).eval()
    prepare = DPTImageProcessorPil(
        size={"height": 384, "width": 384}, keep_aspect_ratio=True, ensure_multiple_of=32
    )
    return estimator, prepare


def depth_pipeline(
    sampler: str, v2: bool = False, **others: Any
) -> StableDiffusionDepth2ImgPipeline:
    none = {"depth_estimator": None, "feature_extractor": None}
    made = parts(sampler, in_channels=5, v2=v2)
    return StableDiffusionDepth2ImgPipeline(**made, **{**none, **others})


def variations_pipeline(sampler: str) -> StableDiffusionImageVariationPipeline:
    return StableDiffusionImageVariationPipeline(
        unet=make_unet(),
        vae=make_vae(),
        image_encoder=make_vision(),
        scheduler=schedulers()[sampler],
        safety_checker=None,
        feature_extractor=CLIP,
        requires_safety_checker=False,
    )


def as_first_revision(folder: Path, vision: Any) -> None:
    """Image variations as first published: a whole CLIP where only its eye is used, and another
    pipeline's name."""
    clip = CLIPModel(
        CLIPConfig(
            vision_config=vision.config.to_dict(),
            text_config=make_text().config.to_dict(),
            projection_dim=WIDTH,
        )
    )
    clip.vision_model.load_state_dict(vision.vision_model.state_dict())
    clip.visual_projection.load_state_dict(vision.visual_projection.state_dict())
    for file in (folder / "image_encoder").iterdir():
        file.unlink()
    clip.save_pretrained(folder / "image_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    index["image_encoder"] = ["transformers", "CLIPModel"]
    index["_class_name"] = "StableDiffusionImageEmbedPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))


def unclip_parts(sampler: str, statistics: bool = True, v2: bool = False) -> dict[str, Any]:
    """unCLIP's decoder; without statistics, as on OpenCLIP H."""
    torch.manual_seed(5)
    normalizer = StableUnCLIPImageNormalizer(WIDTH)
    if statistics:
        normalizer.mean.data.normal_()
        normalizer.std.data.uniform_(0.5, 2)
    return {
        "image_normalizer": normalizer,
        "image_noising_scheduler": DDPMScheduler(**NOISING),
        **parts(
            sampler,
            prediction="v_prediction",
            v2=v2,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * WIDTH,
        ),
    }


def unclip_pipeline(sampler: str, **options: Any) -> StableUnCLIPImg2ImgPipeline:
    made = unclip_parts(sampler, **options)
    return StableUnCLIPImg2ImgPipeline(**made, feature_extractor=CLIP, image_encoder=make_vision())


def prior_text() -> CLIPTextModelWithProjection:
    config = make_text().config
    config.projection_dim = WIDTH
    torch.manual_seed(6)
    return CLIPTextModelWithProjection(config).eval()


def prior_pipeline(sampler: str, head_width: int = 8, **options: Any) -> StableUnCLIPPipeline:
    torch.manual_seed(7)
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=head_width,
        num_layers=2,
        embedding_dim=WIDTH,
        num_embeddings=16,
        additional_embeddings=4,
    )
    for name in ("positional_embedding", "prd_embedding", "clip_mean"):
        getattr(prior, name).data.normal_()
    prior.clip_std.data.uniform_(0.5, 2)
    return StableUnCLIPPipeline(
        **unclip_parts(sampler, **options),
        prior_tokenizer=make_tokenizer(),
        prior_text_encoder=prior_text(),
        prior=prior.eval(),
        prior_scheduler=DDPMScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            clip_sample_range=5.0,
            **NOISING,
        ),
    )


def prior_noises(model: Model, seed: int, steps: int) -> list[torch.Tensor]:
    """What our prior draws, in the order of its steps."""
    assert model.prior is not None
    plan = grid.timesteps(model.prior.schedule, steps, sampler="ddpm")
    source = noise.step_noise(seed, (1, WIDTH), name="prior-step")
    found = []
    for t, sigma, target in zip(plan.timesteps, plan.sigmas, plan.targets, strict=True):
        if t > 0:
            found.append(source(sigma, target))
    return found


def upscale_pipeline(sampler: str, v2: bool = False) -> StableDiffusionUpscalePipeline:
    wide = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    made = parts(
        sampler, v2=v2, in_channels=7, num_class_embeds=1000, only_cross_attention=(True, False)
    )
    made |= {"scheduler": schedulers(prediction_type="v_prediction", **wide)[sampler]}
    made |= {
        "vae": make_vae(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            scaling_factor=0.08333,
        )
    }
    return StableDiffusionUpscalePipeline(
        **made, low_res_scheduler=DDPMScheduler(**wide), max_noise_level=350
    )
