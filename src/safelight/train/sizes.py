"""The published UNets by name, for recipes that train at full size."""

from __future__ import annotations

from safelight import presets
from safelight.spec import ModelSpec, UNetSpec

_MODELS: tuple[ModelSpec, ...] = (
    *(presets.SD_V1, presets.SD_V1_INPAINT, presets.SD_SMALL),
    *(presets.SD_V2_BASE, presets.SD_V2_768, presets.SD_V2_DEPTH, presets.SD_V2_INPAINT),
    *(presets.UNCLIP_H, presets.UNCLIP_L, presets.X4_UPSCALER),
)

UNETS: dict[str, UNetSpec] = {model.name: model.unet for model in _MODELS}
# The first stages of two cards, at 256 pixels.
UNETS |= {f"{name}-256": UNETS[name].replace(sample_size=32) for name in ("sd-v1", "sd-v2-base")}
