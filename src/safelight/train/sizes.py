"""The published UNets by name, for recipes that train at full size."""

from __future__ import annotations

from safelight import presets
from safelight.spec import UNetSpec

_V1, _V2, _V = presets.SD_V1.unet, presets.SD_V2_BASE.unet, presets.SD_V2_768.unet

UNETS: dict[str, UNetSpec] = {
    "sd-v1": _V1,
    "sd-v1-256": _V1.replace(sample_size=32),
    "sd-v1-inpaint": _V1.replace(in_channels=9),
    "small": presets.SD_SMALL.unet,
    "sd-v2-base": _V2,
    "sd-v2-base-256": _V2.replace(sample_size=32),
    "sd-v2-768": _V,
    "sd-v2-depth": _V2.replace(in_channels=5),
    "sd-v2-inpaint": _V2.replace(in_channels=9),
    "unclip-h": presets.UNCLIP_H.unet,
    "unclip-l": presets.UNCLIP_H.unet.replace(class_embedding_size=1536),
    "x4-upscaler": presets.X4_UNET,
}
