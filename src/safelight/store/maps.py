"""Pictures that are not for looking at: masks and depth maps."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops

from safelight.errors import InvalidRequest
from safelight.store.pictures import Source, open_picture, opened


def open_mask(source: Source, *, field: str = "mask") -> Image.Image:
    """A mask as 8-bit grey, 255 where the picture is made anew.

    White says so; in a picture with an alpha channel, transparency does.

    Raises:
        InvalidRequest: missing, not a picture, broken, or too large.
    """
    clear = transparency(source, field=field)
    return open_picture(source, field=field).convert("L") if clear is None else clear


def transparency(source: Source, *, field: str = "image") -> Image.Image | None:
    """How clear each pixel is, as 8-bit grey: 255 is nothing. None without an alpha channel."""
    image = opened(source, field=field)
    if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return None
    try:
        return ImageChops.invert(image.convert("RGBA").getchannel("A"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidRequest(field, f"is broken: {error}.") from error


def open_depth(source: Source, *, field: str = "depth") -> np.ndarray:
    """A depth map, float32 ``(H, W)``, in its own unit: 8 or 16 bits, or an array of numbers.

    Raises:
        InvalidRequest: missing, broken, too large, or with values that are none.
    """
    if isinstance(source, np.ndarray):
        values = source[..., 0] if source.ndim == 3 and source.shape[-1] == 1 else source
        if values.ndim != 2:
            raise InvalidRequest(field, f"an array of shape {source.shape}.", "Expected (H, W).")
        values = values.astype(np.float32)
    else:
        image = opened(source, field=field)
        try:
            deep = image.mode == "F" or image.mode.startswith("I")
            values = np.asarray(image if deep else image.convert("L"), dtype=np.float32)
        except (OSError, ValueError, SyntaxError) as error:
            raise InvalidRequest(field, f"is broken: {error}.") from error
    if not np.isfinite(values).all():
        raise InvalidRequest(field, "holds values that are not finite.")
    return values
