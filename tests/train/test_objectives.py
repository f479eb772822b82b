"""The objectives on micro networks: stateless batches, mirrored captions, exports that load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safelight.data import stilllife
from safelight.data.renders import GROUP, open_labels, open_renders, scene_at, scenes_of
from safelight.parts import load_text, load_unet, load_vae
from safelight.train.autoencoder import AutoencoderObjective, edge_weight
from safelight.train.contrastive import ContrastiveObjective, patch_targets
from safelight.train.latent import LatentDiffusionObjective, stratified_timesteps
from safelight.train.loop import Run
from safelight.train.pictures import Stream
from safelight.train.recipe import DataRecipe, Recipe

COUNT = 32


@pytest.fixture(scope="module")
def renders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of few, small renders, validation sets included."""
    folder = tmp_path_factory.mktemp("renders")
    for split, seed, count in (("train", 1, COUNT), ("val", 2, 4096), ("combo", 3, 4096)):
        path = folder / f"stilllife-{split}-{seed}-16px-{count}.npy"
        shape = (count, 16, 16, 3)
        pictures = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        few = scenes_of(seed, COUNT, split)  # type: ignore[arg-type]
        pictures[: len(few)] = stilllife.render(few, 16)
        path.with_suffix(".json").write_text("{}")
    return folder


def recipe(renders: Path, folder: Path, **sections: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "micro",
            "output": folder,
            "images": 16,
            "data": {"size": 16, "count": COUNT, "cache": renders},
            "optim": {"batch": 8, "lr": 1e-3},
            **sections,
        }
    )


VAE = {"vae": {"channels": [8, 8], "layers_per_block": 1, "norm_groups": 4}}


def test_renders_are_a_cache_of_the_scenes(tmp_path: Path) -> None:
    drawn = open_renders(tmp_path, seed=5, split="train", size=16, count=6, workers=1)
    again = open_renders(tmp_path, seed=5, split="train", size=16, count=6, workers=1)
    assert np.array_equal(drawn, again)
    expected = stilllife.render(scenes_of(5, 6, "train"), 16)
    assert int(np.abs(drawn.astype(int) - expected).max()) <= 1


def test_groups_differ_in_one_way_and_are_never_held_out() -> None:
    for index in range(50):
        group = scene_at(1, index, "train")
        assert len(group) == GROUP
        assert not any(stilllife.is_held_out(s) for s in group)


def test_stream_epochs_cover_everything_once(renders: Path) -> None:
    stream = Stream(DataRecipe(size=16, count=COUNT, cache=renders), seed=3)
    places, flips = stream.places(0, 2 * COUNT)
    assert sorted(places[:COUNT]) == list(range(COUNT))
    assert sorted(places[COUNT:]) == list(range(COUNT))
    assert 0 < flips.sum() < 2 * COUNT
    later, _ = Stream(DataRecipe(size=16, count=COUNT, cache=renders), seed=3).places(COUNT, COUNT)
    assert np.array_equal(later, places[COUNT:]), "keyed by index, not by calls before"


def test_mirrored_pictures_exchange_left_and_right(renders: Path) -> None:
    stream = Stream(DataRecipe(size=16, count=COUNT, cache=renders), seed=0)
    places = np.arange(COUNT)
    straight = stream.pixels(places, np.zeros(COUNT, bool))
    mirrored = stream.pixels(places, np.ones(COUNT, bool))
    assert torch.equal(straight.flip(-1), mirrored)
    for scene, seen in zip(
        stream.scenes, stream.seen_scenes(places, np.ones(COUNT, bool)), strict=True
    ):
        if scene.arrangement == stilllife.Arrangement.LEFT_RIGHT:
            assert seen.a.pair == scene.b.pair  # type: ignore[union-attr]


def test_patch_labels_name_the_objects(tmp_path: Path) -> None:
    labels = open_labels(tmp_path, seed=1, split="train", count=8)
    scenes = scenes_of(1, 8, "train")
    targets = patch_targets(labels, scenes)
    assert targets.shape == (8, 64, 3)
    for k, scene in enumerate(scenes):
        shown = targets[k][targets[k, :, 0] == 1]
        assert len(shown), "object a covers some patch"
        assert set(shown[:, 1].tolist()) == {stilllife.SHAPES.index(scene.a.shape) + 1}
        assert set(shown[:, 2].tolist()) == {stilllife.COLOURS.index(scene.a.colour) + 1}


def test_edges_weigh_more() -> None:
    pixels = torch.zeros(1, 3, 8, 8)
    pixels[..., 4:] = 1.0
    weight = edge_weight(pixels, 2.0)
    assert float(weight[0, 0, 4, 0]) == 1.0
    assert float(weight[0, 0, 4, 4]) == 3.0


def test_timesteps_are_spread_evenly() -> None:
    t = stratified_timesteps(1000, 64, 1000, seed=0)
    assert torch.bincount(t // 125, minlength=8).min() >= 7
    high = stratified_timesteps(0, 10000, 1000, seed=0, power=0.5)
    assert float((high >= 500).float().mean()) == pytest.approx(0.75, abs=0.01)


def test_all_stages_run_and_export(renders: Path, tmp_path: Path) -> None:
    vae = AutoencoderObjective(recipe(renders, tmp_path / "vae", vae=VAE))
    numbers = Run(vae.recipe, vae).go()
    assert set(numbers) >= {"psnr_val", "psnr_combo_two", "latent_std"}
    loaded = load_vae(tmp_path / "vae")
    assert loaded.spec.scaling_factor == pytest.approx(1 / numbers["latent_std"], rel=0.2)

    text = {
        "vocab_size": 684,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "mlp_width": 32,
        "context_length": 32,
        "projection_width": 16,
        "bos_id": 682,
        "eos_id": 683,
        "pad_id": 683,
    }
    vision = {
        "image_size": 16,
        "patch_size": 2,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "mlp_width": 32,
        "projection_width": 16,
    }
    open_labels(renders, seed=1, split="train", count=COUNT)
    clip = ContrastiveObjective(
        recipe(renders, tmp_path / "clip", clip={"text": text, "vision": vision})
    )
    first = clip.batch(8, 8)
    again = clip.batch(8, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    loss, logged = clip.loss(clip.module, first)
    assert bool(loss.isfinite())
    assert 0 <= logged["all_right"] <= 1
    (tmp_path / "clip").mkdir()
    clip.export(clip.module, tmp_path / "clip")
    tower, tokenizer = load_text(tmp_path / "clip")
    states = tower(torch.tensor(tokenizer.tokens(["a red cube"]))).states
    assert states.shape == (1, 32, 16)

    unet = {
        "sample_size": 8,
        "channels": [8, 8],
        "attention": [True, True],
        "heads": [2, 2],
        "only_cross_attention": [False, False],
        "layers_per_block": 1,
        "context_width": 16,
        "norm_groups": 4,
    }
    diffusion = {
        "unet": unet,
        "prediction_type": "v",
        "clip": tmp_path / "clip",
        "vae": tmp_path / "vae",
    }
    v1 = LatentDiffusionObjective(recipe(renders, tmp_path / "v1", diffusion=diffusion))
    batch, again = v1.batch(0, 8), v1.batch(0, 8)
    assert torch.equal(batch.told.tokens, again.told.tokens)
    assert torch.equal(batch.latents, again.latents)
    assert torch.equal(batch.noise, again.noise)
    loss, _ = v1.loss(v1.module, batch)
    # The last layer starts at zero, so the first loss is the mean square of v itself.
    assert float(loss.detach()) == pytest.approx(1.0, abs=0.5)
    numbers = Run(v1.recipe, v1).go()
    assert set(numbers) >= {"loss_val", "loss_combo_q4"}
    unet_again, schedule = load_unet(tmp_path / "v1")
    assert schedule.prediction_type == "v"
    assert unet_again.spec.channels == (8, 8)
