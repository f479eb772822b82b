"""Pictures as the pipelines of diffusers take them: files, PIL pictures, arrays, tensors.

A tensor means two things there. What a run starts from is pixels, in [0, 1] or [-1, 1]. What CLIP
looks at is already prepared, normalised and of CLIP's own size, as the image variations' card does
it with torchvision's transforms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from safelight.errors import InvalidRequest
from safelight.inputs import picture_input

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from safelight.model import Model

Row = dict[str, Any]
"""Fields of a request, for one picture."""


def listed(value: Any) -> list[Any]:
    """Several, or one alone as a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def started_from(image: Any) -> list[Row]:
    """What each picture starts from, and its size in whole steps of 8, as the reference cuts it.

    Args:
        image: one or several; tensors ``(3, H, W)`` or ``(B, 3, H, W)`` and arrays
            ``(B, H, W, 3)`` with values in [0, 1], or [-1, 1] where some are below 0.

    Raises:
        InvalidRequest: there is none, or it cannot be read.
    """
    rows = []
    for each in listed(image):
        for one in _unstacked(each):
            try:
                given = picture_input(one)
                width, height = (side - side % 8 for side in given.size)
            except ValueError as error:
                raise InvalidRequest("image", str(error)) from None
            rows.append({"image": given, "width": width, "height": height})
    return rows


def looked_at(model: Model, image: Any) -> list[Row]:
    """What each picture is to be like.

    Args:
        image: one or several; a tensor ``(3, S, S)`` or ``(B, 3, S, S)`` is what CLIP of side S
            sees, with its mean taken off: its embedding goes into the request.

    Raises:
        InvalidRequest: there is none, it cannot be read, or is a tensor of another shape.
    """
    rows: list[Row] = []
    for each in listed(image):
        if _is_tensor(each):
            rows += [{"image_embedding": row} for row in _embedded(model, each)]
        else:
            rows.append({"image": _read(each)})
    return rows


def embeddings(given: Any) -> list[Row]:
    """CLIP picture embeddings ``(D,)`` or ``(B, D)``, or a list of rows."""
    if hasattr(given, "tolist"):
        given = given.tolist()
    rows = given if given and isinstance(given[0], list | tuple) else [given]
    return [{"image_embedding": row} for row in rows]


def _read(value: Any) -> Any:
    if value is None:
        raise InvalidRequest("image", "is missing.", "Give a picture.")
    try:
        return picture_input(value)
    except ValueError as error:
        raise InvalidRequest("image", str(error)) from None


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach") and hasattr(value, "numpy")


def _unstacked(value: Any) -> Iterator[Any]:
    """A batch's pictures one by one, tensors as arrays ``(H, W, C)`` in [0, 1]."""
    if _is_tensor(value):
        for each in value.detach().float().cpu().numpy().reshape(-1, *value.shape[-3:]):
            yield _unit(each.transpose(1, 2, 0)) if each.ndim == 3 else each
    elif getattr(value, "ndim", 0) == 4:
        yield from value
    elif value is None:
        raise InvalidRequest("image", "is missing.", "Give the picture to start from.")
    else:
        yield value


def _unit(pixels: np.ndarray) -> np.ndarray:
    """From [-1, 1] where some are below 0, as the reference tells the two apart."""
    return (pixels / 2 + 0.5).clip(0, 1) if pixels.min() < 0 else pixels


def _embedded(model: Model, pixels: Tensor) -> list[list[float]]:
    from safelight.conditioning.image import embed_pixels

    if model.vision is None:
        raise InvalidRequest("image", f"{model.spec.name} has no vision tower to look with.")
    side = model.vision.spec.image_size
    batch = pixels[None] if pixels.ndim == 3 else pixels
    if batch.ndim != 4 or tuple(batch.shape[1:]) != (3, side, side):
        raise InvalidRequest(
            "image",
            f"is a tensor of shape {tuple(pixels.shape)}.",
            f"A prepared one is (3, {side}, {side}), normalised as CLIP's; or give the picture.",
        )
    return [embed_pixels(model, one[None])[0].tolist() for one in batch]
