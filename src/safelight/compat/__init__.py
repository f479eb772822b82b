"""The cards' own class names, as thin faces over the one ``generate``.

For code that was written for diffusers or lambda-diffusers: change the import, keep the lines.

    from safelight.compat import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained("CompVis/stable-diffusion-v1-4")
    image = pipe("a photo of an astronaut riding a horse on mars").images[0]

They keep diffusers' argument names and defaults. What they cannot do is an error that names the
argument; :func:`safelight.load` is the whole interface.
"""

from safelight.compat.base import Output
from safelight.compat.pipelines import (
    StableDiffusionImageEmbedPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableUnCLIPImg2ImgPipeline,
)
from safelight.compat.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "Output",
    "PNDMScheduler",
    "StableDiffusionImageEmbedPipeline",
    "StableDiffusionImageVariationPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionPipeline",
    "StableUnCLIPImg2ImgPipeline",
    "UniPCMultistepScheduler",
]
