"""Warm starts: from the weights of one UNet to those of another that was derived from it.

* Further input channels start at zero, so that the new network first does what the old one did
  (the depth and inpainting cards); so do the last layers of new embeddings (class vector,
  guidance scale).
* Fewer layers a block: the first layer of each block of the old one (seed 004), where on the way
  up the last layer is paired with the last, whose skip connection has its width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from safelight.errors import InvalidRequest
from safelight.nets.unet import UNet
from safelight.spec import UNetSpec

_LAYER = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)")
_SILENT = ("class_embedding.linear_2.", "time_embedding.cond_proj.")


def teacher_key(key: str, student: UNetSpec, teacher: UNetSpec) -> str:
    """Which of the teacher's weights a weight of a student with fewer layers a block takes.

    Down: layer j is the teacher's layer j. Up: likewise, but the last is the teacher's last: it
    reads what the level above left behind, in both (widths 2560, 1920, 960 and 640 of v1's).
    """
    match = _LAYER.fullmatch(key)
    if match is None:
        return key
    way, level, part, layer, rest = match.groups()
    index = int(layer)
    if way == "up" and index == student.layers_per_block:
        index = teacher.layers_per_block
    return f"{way}_blocks.{level}.{part}.{index}.{rest}"


def warm_start(unet: UNet, weights: Mapping[str, Tensor], source: UNetSpec) -> None:
    """Fill ``unet`` from the weights of a UNet of spec ``source``; see the file's head.

    Raises:
        InvalidRequest: the two differ in more than inputs, embeddings and depth; names the weight.
    """
    spec = unet.spec
    if spec.layers_per_block > source.layers_per_block:
        raise InvalidRequest(
            "diffusion.unet.layers_per_block",
            f"{spec.layers_per_block}, but start has {source.layers_per_block}.",
        )
    filled = {}
    for key, value in unet.state_dict().items():
        old = weights.get(teacher_key(key, spec, source))
        if old is not None and old.shape == value.shape:
            filled[key] = old
        elif old is not None and key == "conv_in.weight" and old.shape[1] < value.shape[1]:
            filled[key] = torch.zeros_like(value)
            filled[key][:, : old.shape[1]] = old
        elif old is None and key.startswith(_SILENT):
            filled[key] = torch.zeros_like(value)
        elif old is None and key.startswith("class_embedding."):
            filled[key] = value
        else:
            has = "nothing" if old is None else "x".join(map(str, old.shape))
            raise InvalidRequest(
                "start",
                f"{key} is {'x'.join(map(str, value.shape))} here and {has} there.",
                "Start from a UNet of the same widths, or from none.",
            )
    unet.load_state_dict(filled)
