"""Named features: which network, which weights, and pictures of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from safelight.data import stilllife
from safelight.data.clip import load_clip, unit
from safelight.errors import InvalidRequest, WeightsError
from safelight.evaluate import features
from safelight.evaluate.towers import clip_features


def scenes(n: int, size: int = 64) -> np.ndarray:
    return stilllife.render([stilllife.scene(3, i, "val") for i in range(n)], size)


def test_clip_features_are_the_towers() -> None:
    clip = load_clip(device="cpu")
    pictures = scenes(5)
    found = features.clip_extractor(clip)(iter(pictures))
    expected = clip_features(clip.vision, projected=True)(pictures)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(unit(found), clip.pictures(Image.fromarray(p) for p in pictures))


def test_the_name_tells_weights_apart() -> None:
    clip = load_clip(device="cpu")
    before = features.clip_extractor(clip).name
    assert before.startswith("clip:tiny@")
    with torch.no_grad():
        clip.vision.visual_projection.weight.add_(1)
    assert features.clip_extractor(clip).name != before


def test_clips_by_what_is_at_hand(tmp_path: Path) -> None:
    assert features.named_clip("tiny-v", device="cpu").name == "tiny"
    with pytest.raises(WeightsError, match="holds no CLIP"):
        features.named_clip(tmp_path)


def test_streams_of_any_size_and_none() -> None:
    extractor = features.Extractor(
        "mean", lambda p: np.stack([np.asarray(x).mean((0, 1)) for x in p])
    )
    mixed = [Image.new("L", (8, 4), 10), np.full((2, 3, 3), 20, np.uint8), *scenes(70, 8)]
    found = extractor(mixed)
    assert found.shape == (72, 3)
    np.testing.assert_allclose(found[:2], [[10] * 3, [20] * 3])
    with pytest.raises(ValueError, match="no pictures"):
        extractor([])
    with pytest.raises(ValueError, match="NaN"):
        features.Extractor("nan", lambda p: np.full((len(p), 2), np.nan))(mixed)


class Detector(nn.Module):
    """The published file's way of being called."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        means = img.float().mean([2, 3])
        if return_features:
            return means.repeat(1, 683)[:, :2048]
        return means


class Plain(nn.Module):
    def forward(self, img: Tensor) -> Tensor:
        return img.float().mean([2, 3])


def test_inception_comes_as_torchscript(tmp_path: Path) -> None:
    file = tmp_path / "inception.pt"
    torch.jit.script(Detector()).save(str(file))
    extractor = features.inception_extractor(file, device="cpu")
    assert extractor.name.startswith("inception:inception.pt@")
    assert extractor.name.endswith(":pool3")
    mixed = [*scenes(2, 8), *scenes(1, 16)]
    found = extractor(mixed)
    assert found.shape == (3, 2048)
    np.testing.assert_allclose(found[:, :3], [p.mean((0, 1)) for p in mixed], rtol=1e-5)


def test_other_files_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no file"):
        features.inception_extractor(tmp_path / "none.pt")
    weights = tmp_path / "pt_inception.pth"
    for legacy in (True, False):
        torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, weights,
                   _use_new_zipfile_serialization=not legacy)  # fmt: skip
        with pytest.raises(WeightsError, match=r"weights alone.*inception-2015-12-05\.pt"):
            features.inception_extractor(weights)
    torch.jit.script(Plain()).save(str(tmp_path / "other.pt"))
    with pytest.raises(WeightsError, match="2048"):
        features.inception_extractor(tmp_path / "other.pt", device="cpu")(scenes(1))
