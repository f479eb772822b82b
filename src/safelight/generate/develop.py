"""Latents to a picture, or why there is none."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from safelight.generate import thrift
from safelight.generate.guard import Shown
from safelight.model import Model
from safelight.nets.vae import to_uint8
from safelight.request import Outcome

NAN_FIX = "Try dtype float32, or a lower guidance scale."


@torch.inference_mode()
def develop(
    model: Model,
    latents: Tensor,
    breathe: Callable[[], object] | None = None,
    *,
    tiny: bool = False,
) -> tuple[Shown, bool]:
    """Decode ``latents`` (1, C, h, w), in tiles where memory runs out.

    Args:
        breathe: called between pieces of the decoder; see :meth:`Engine.interleave
            <safelight.engine.Engine.interleave>`.
        tiny: by the model's tiny decoder.

    Returns:
        what there is to see, before anybody has looked at it; whether it was made in tiles.
    """
    try:
        if tiny:
            return _developed(model, latents, lambda z: sketch(model, z)), False
        return _developed(model, latents, lambda z: decode(model, z, breathe)), False
    except Exception as error:
        if not thrift.is_out_of_memory(error):
            raise
        thrift.relieve(error)
    factor = model.spec.vae.factor
    tiles = _developed(
        model,
        latents,
        lambda z: thrift.decode_in_tiles(lambda tile: decode(model, tile), z, factor),
    )
    return tiles, True


def decode(model: Model, latents: Tensor, breathe: Callable[[], object] | None = None) -> Tensor:
    """Alone, whatever the batch: the decoder adds no difference between batches."""
    latents = latents.to(next(model.vae.parameters()).dtype)
    if breathe is None:
        return model.runtime.decode(latents)
    pieces = model.runtime.decoding(latents)
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            return stop.value
        breathe()


def sketch(model: Model, latents: Tensor) -> Tensor:
    """By the tiny decoder."""
    assert model.tiny_decoder is not None
    return model.runtime.sketch(latents.to(next(model.tiny_decoder.parameters()).dtype))


def to_image(pixels: Tensor) -> Image.Image:
    """The first of pixels ``(N, 3, H, W)`` in [-1, 1]."""
    return Image.fromarray(to_uint8(pixels)[0].cpu().numpy())


def _developed(model: Model, latents: Tensor, decode: Callable[[Tensor], Tensor]) -> Shown:
    if not bool(torch.isfinite(latents).all()):
        return Shown(None, Outcome.nan, f"the latents are not finite. {NAN_FIX}")
    pixels = decode(latents)
    if bool(torch.isfinite(pixels).all()):
        return Shown(to_image(pixels), Outcome.ok, "")
    dtype = next(model.vae.parameters()).dtype
    if dtype != torch.float32:
        pixels = copy.deepcopy(model.vae).float().decode(latents.float())
        if bool(torch.isfinite(pixels).all()):
            name = str(dtype).removeprefix("torch.")
            message = f"the decoder overflowed in {name}; decoded again in float32"
            return Shown(to_image(pixels), Outcome.nan_recovered, message)
    return Shown(None, Outcome.nan, f"the decoder's pixels are not finite. {NAN_FIX}")
