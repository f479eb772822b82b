"""The probe reads what an embedding holds, and not what it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safelight.data import stilllife
from safelight.data.attributes import ATTRIBUTE_CLASSES, attribute_classes
from safelight.evaluate.probe import agreement, read_out, train_probe
from safelight.evaluate.towers import autoencode, clip_features
from safelight.nets.clip import VisionTower
from safelight.nets.vae import VAE
from safelight.spec import VAESpec, VisionSpec


@pytest.fixture(scope="module")
def classes() -> np.ndarray:
    return attribute_classes([stilllife.scene(51, i, "all") for i in range(1500)])


def test_an_embedding_of_everything_is_read(classes: np.ndarray) -> None:
    hot = [np.eye(n)[classes[:, i]] for i, n in enumerate(ATTRIBUTE_CLASSES.values())]
    embeddings = 3 + 0.1 * np.concatenate(hot, axis=1)
    probe = train_probe(embeddings[:1000], classes[:1000], epochs=10)
    assert agreement(read_out(probe, embeddings[1000:]), classes[1000:])["all"] >= 0.98


def test_an_embedding_without_colour_gives_no_colour(classes: np.ndarray) -> None:
    hot = [
        np.eye(n)[classes[:, i]]
        for i, (name, n) in enumerate(ATTRIBUTE_CLASSES.items())
        if not name.startswith("colour")
    ]
    embeddings = np.concatenate(hot, axis=1)
    probe = train_probe(embeddings[:1000], classes[:1000], epochs=10)
    found = agreement(read_out(probe, embeddings[1000:]), classes[1000:])
    assert found["shape_a"] >= 0.98
    assert found["colour_a"] <= 0.3


def test_a_probe_is_the_same_twice_and_leaves_the_global_random_state(
    classes: np.ndarray,
) -> None:
    embeddings = np.random.default_rng(0).standard_normal((512, 8))
    before = torch.get_rng_state()
    one, two = (train_probe(embeddings, classes[:512], epochs=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(read_out(one, embeddings), read_out(two, embeddings))


def test_features_and_autoencoder_take_pictures_of_any_number() -> None:
    torch.manual_seed(0)
    tower = VisionTower(
        VisionSpec(
            image_size=32, patch_size=8, width=16, layers=1, heads=2, mlp_width=16,
            projection_width=8,
        )
    )  # fmt: skip
    pictures = stilllife.render([stilllife.scene(52, i) for i in range(5)], 64)
    pooled, projected = clip_features(tower, batch=2), clip_features(tower, projected=True)
    assert pooled(pictures).shape == (5, 16)
    assert projected(pictures).shape == (5, 8)
    assert pooled(pictures[:0]).shape == (0, 16)
    np.testing.assert_allclose(pooled(pictures)[3:4], pooled(pictures[3:4]), atol=1e-5)
    vae = VAE(VAESpec(channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=4)).eval()
    back = autoencode(vae, batch=2)(pictures)
    assert back.shape == pictures.shape
    assert back.dtype == np.uint8
