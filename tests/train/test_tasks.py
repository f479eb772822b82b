"""What each task tells the network: shapes, twins, shares, and that it depends on the index."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from safelight.data import stilllife
from safelight.data.renders import scenes_of
from safelight.diffusion import losses
from safelight.diffusion.schedule import Schedule
from safelight.errors import InvalidRequest
from safelight.presets import NOISE_AUGMENTATION
from safelight.train.latent import LatentDiffusionObjective
from safelight.train.masks import lama_mask
from safelight.train.pictures import Captioned, Stream, key
from safelight.train.prior import PriorObjective
from safelight.train.recipe import DataRecipe, Recipe
from safelight.train.rehearsal import WIDTH, RandomPictures, small_parts
from safelight.train.tasks import Told, class_vector

UNET: dict[str, Any] = {
    "sample_size": 4,
    "channels": [8, 8],
    "attention": [True, True],
    "heads": [2, 2],
    "only_cross_attention": [False, False],
    "layers_per_block": 1,
    "context_width": WIDTH,
    "norm_groups": 4,
}
VECTOR = {"class_embedding": "projection", "class_embedding_size": 2 * WIDTH}
LABEL = {"class_embedding": "table", "class_embedding_size": 1000}


def objective(
    task: str, unet: dict[str, Any] | None = None, size: int = 32, **settings: Any
) -> LatentDiffusionObjective:
    recipe = Recipe.model_validate(
        {
            "name": "micro",
            "output": "nowhere",
            "images": 64,
            "data": {"size": size, "count": 64},
            "diffusion": {
                "task": task,
                "unet": {**UNET, **(unet or {})},
                "prediction_type": "v",
                "clip": "none",
                "vae": "none",
                **settings,
            },
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = small_parts(size, 4 if task == "x4" else 8)
    return LatentDiffusionObjective(recipe, frozen=parts, pictures=RandomPictures(size))


CASES: list[tuple[str, dict[str, Any], int]] = [
    ("text", {}, 32),
    ("variations", {}, 32),
    ("unclip", VECTOR, 32),
    ("inpaint", {"in_channels": 9}, 32),
    ("depth", {"in_channels": 5}, 32),
    ("x4", {"in_channels": 7, **LABEL}, 16),
]


@pytest.mark.parametrize(("task", "unet", "size"), CASES, ids=[c[0] for c in CASES])
def test_a_task_is_a_function_of_the_index_and_trains(
    task: str, unet: dict[str, Any], size: int
) -> None:
    made = objective(task, unet, size)
    whole, half = made.batch(0, 8), made.batch(4, 4)
    for a, b in zip(whole.told, half.told, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a[4:], b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.noise[4:], half.noise)
    loss, logged = made.loss(made.module, whole)
    loss.backward()
    assert bool(loss.isfinite())
    assert set(logged) <= {"high_noise"}
    weight = made.module.conv_out.weight
    assert weight.grad is not None
    assert float(weight.grad.abs().sum()) > 0
    made.task.twin(whole.told)


def test_variations_have_one_token_and_a_zero_twin() -> None:
    made = objective("variations", drop_caption=0.5)
    told = made.batch(0, 64).told
    assert told.tokens.shape == (64, 1, WIDTH)
    gone = (told.tokens == 0).all(2).sum()
    assert 20 < int(gone) < 44
    assert not bool(made.task.twin(told).tokens.any())
    pixels = made.pictures.pixels(np.arange(64), np.zeros(64, bool))
    seen = made.frozen.look(pixels)
    kept = ~(told.tokens == 0).all(2)[:, 0]
    torch.testing.assert_close(told.tokens[kept, 0], seen[kept], rtol=1e-4, atol=1e-5)


def test_only_cross_attention_trains_where_asked() -> None:
    made = objective("variations", train="cross_attention")
    trained = [n for n, p in made.module.named_parameters() if p.requires_grad]
    assert trained
    assert all(".attn2." in name for name in trained)
    every = objective("variations")
    assert all(p.requires_grad for p in every.module.parameters())


def test_unclip_vectors_are_noised_levelled_and_a_quarter_is_zero() -> None:
    made = objective("unclip", VECTOR)
    vectors = torch.cat([made.batch(i, 64).told.vector for i in range(0, 512, 64)])  # type: ignore[misc]
    share = float((vectors == 0).all(1).float().mean())
    assert share == pytest.approx(0.25, abs=0.06)
    # Levels are read back from the sinusoid: its first cosine is cos(level).
    schedule = Schedule.from_spec(NOISE_AUGMENTATION)
    e, n = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    mean, std = torch.randn(1, WIDTH), torch.rand(1, WIDTH) + 0.5
    levels = torch.tensor([0, 500, 999])
    made_vector = class_vector(e, levels, n, schedule, mean, std)
    assert made_vector[0, WIDTH : WIDTH + WIDTH // 2].eq(1).all()
    assert made_vector[0, WIDTH + WIDTH // 2 :].eq(0).all()
    close = e[0] * 0.9999794 + mean[0] * (1 - 0.9999794) + 0.0064253 * n[0] * std[0]
    torch.testing.assert_close(made_vector[0, :WIDTH], close, rtol=1e-4, atol=1e-5)
    noise = n[2] * std[0] + mean[0]
    torch.testing.assert_close(made_vector[2, :WIDTH], noise, rtol=1e-2, atol=1e-3)


def test_inpainting_hides_what_its_mask_says() -> None:
    made = objective("inpaint", {"in_channels": 9}, drop_picture=1.0)
    planes = made.batch(0, 4).told.planes
    assert planes is not None
    assert planes.shape == (4, 5, 4, 4)
    grey = made.frozen.encode(torch.zeros(1, 3, 32, 32))
    for row in planes:
        assert bool((row[0] == 1).all())
        torch.testing.assert_close(row[1:], grey[0], rtol=1e-4, atol=1e-5)
    made = objective("inpaint", {"in_channels": 9}, drop_picture=0.0)
    planes = made.batch(0, 32).told.planes
    assert planes is not None
    assert set(planes[:, 0].unique().tolist()) == {0.0, 1.0}
    kept = 1 - planes[:, 0].flatten(1).mean(1)
    assert 0.2 < float(kept.mean()) < 0.8
    whole = made.frozen.encode(made.pictures.pixels(np.arange(32), np.zeros(32, bool)))
    off = (planes[:, 1:] - whole).abs().mean((1, 2, 3))
    assert float(off[kept > 0.9].mean()) < float(off[kept < 0.1].mean())


def test_masks_are_lamas() -> None:
    rng = np.random.Generator(np.random.Philox(0))
    masks = np.stack([lama_mask(rng, 64, 64) for _ in range(400)])
    assert set(np.unique(masks)) == {0.0, 1.0}
    share = masks.mean((1, 2))
    assert 0.25 < share.mean() < 0.75
    assert share.min() > 0.0
    assert not np.array_equal(masks[0], masks[1])


def test_x4_sees_a_noised_quarter_and_is_told_its_level() -> None:
    made = objective("x4", {"in_channels": 7, **LABEL}, 16)
    parts = [made.batch(i, 64).told for i in range(0, 512, 64)]
    levels = torch.cat([p.vector for p in parts])  # type: ignore[misc]
    assert int(levels.min()) >= 0
    assert 340 <= int(levels.max()) < 350
    assert float(levels.float().mean()) == pytest.approx(175, abs=20)
    assert parts[0].planes.shape == (64, 3, 4, 4)  # type: ignore[union-attr]


def test_depth_is_the_renderers_and_turns_with_the_picture(tmp_path: Path) -> None:
    data = DataRecipe(size=16, count=4, cache=tmp_path)
    scenes = scenes_of(1, 4, "train")
    path = tmp_path / "stilllife-train-1-16px-4.npy"
    np.save(path, stilllife.render(scenes, 16))
    path.with_suffix(".json").write_text("{}")
    stream = Stream(data, 0)
    places = np.arange(4)
    straight = stream.nearness(places, np.zeros(4, bool), 8)
    turned = stream.nearness(places, np.ones(4, bool), 8)
    assert torch.equal(straight.flip(-1), turned)
    near = -stilllife.render_full(scenes, 16, oversample=1).depth
    pooled = near.reshape(4, 8, 2, 8, 2).mean((2, 4))
    for made, true in zip(straight.numpy(), pooled, strict=True):
        assert np.corrcoef(made.ravel(), true.ravel())[0, 1] > 0.98


def test_channels_that_do_not_add_up_are_named() -> None:
    with pytest.raises(InvalidRequest, match=r"diffusion\.unet\.in_channels.*needs 9"):
        objective("inpaint")
    with pytest.raises(InvalidRequest, match="class_embedding_size"):
        objective("unclip", {**VECTOR, "class_embedding_size": 6})


def test_crops_are_of_the_picture_and_keyed() -> None:
    made = objective("text")
    made.recipe = made.recipe.replace(data=made.recipe.data.replace(crop=16))
    first, again = made.batch(0, 4), made.batch(0, 4)
    assert first.latents.shape[-1] == 2
    assert torch.equal(first.latents, again.latents)


@pytest.mark.parametrize(
    "settings",
    [{"offset_noise": 0.2}, {"input_perturbation": 0.2}, {"weighting": "min_snr"}],
    ids=lambda s: next(iter(s)),
)
def test_options_act(settings: dict[str, Any]) -> None:
    """Each against the loss written out with the functions of diffusion/losses."""
    plain, made = objective("text"), objective("text", **settings)
    torch.nn.init.normal_(made.module.conv_out.weight, std=0.1)
    plain.module.load_state_dict(made.module.state_dict())
    a, b = plain.batch(0, 8), made.batch(0, 8)
    noise, seen = a.noise, a.noise
    if "offset_noise" in settings:
        shift = np.stack([_after(made, i, 0) for i in range(8)])[:, :4]
        noise = seen = losses.offset_noise(noise, torch.from_numpy(shift), 0.2)
        assert float((b.noise - a.noise).std(dim=(2, 3)).max()) < 1e-6, "one shift a channel"
    if "input_perturbation" in settings:
        extra = np.stack([_after(made, i, 0) for i in range(8)])
        seen = losses.perturbed_noise(noise, torch.from_numpy(extra).reshape(noise.shape), 0.2)
    torch.testing.assert_close(b.noise, noise)
    torch.testing.assert_close(b.seen_noise, seen)
    expected = losses.diffusion_loss(
        lambda x, t: made.module(x, t, b.told.tokens),
        a.latents,
        noise,
        a.t,
        made.schedule,
        weighting=settings.get("weighting", "none"),
        input_noise=seen,
    )
    loss, _ = made.loss(made.module, b)
    other, _ = plain.loss(plain.module, a)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(loss.detach()) != pytest.approx(float(other.detach()), rel=1e-4)


def _after(made: LatentDiffusionObjective, index: int, skipped: int) -> np.ndarray:
    """The numbers that picture ``index`` draws after its posterior's noise."""
    rng = key(made.recipe.seed, index, 8)
    rng.standard_normal((4, 4, 4), dtype=np.float32)
    return rng.standard_normal(64 if made.settings.input_perturbation else 4, dtype=np.float32)


def test_pictures_of_a_reader() -> None:
    read: list[int] = []

    class Numbers:
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return SimpleNamespace(
                pixels=np.full((8, 8, 3), index, np.uint8), caption=f"picture {index}"
            )

    pictures = Captioned(Numbers(), "numbers", {"val": Numbers()})
    places, flips = pictures.places(3, 2)
    pixels = pictures.pixels(places, flips)
    assert pixels[:, 0, 0, 0].tolist() == pytest.approx([3 / 127.5 - 1, 4 / 127.5 - 1])
    assert pictures.captions(places, flips, []) == ["picture 3", "picture 4"]
    assert read == [3, 4], "decoded once"
    assert pictures.held_out("val", 8) is not None
    assert pictures.held_out("pair", 8) is None
    with pytest.raises(InvalidRequest, match="depth"):
        pictures.nearness(places, flips, 4)


def test_told_moves_by_rows() -> None:
    told = Told(torch.arange(6.0).reshape(3, 1, 2), vector=torch.arange(3))
    assert told.each(rows=slice(1, 3)).vector.tolist() == [1, 2]  # type: ignore[union-attr]


def test_the_prior_learns_normalised_embeddings() -> None:
    recipe = Recipe.model_validate(
        {
            "name": "prior",
            "output": "nowhere",
            "images": 64,
            "data": {"size": 32},
            "prior": {
                "clip": "none",
                "drop_caption": 0.5,
                "prior": {
                    "heads": 2,
                    "head_width": 4,
                    "layers": 1,
                    "embedding_width": WIDTH,
                    "text_tokens": 32,
                },
            },
        }
    )
    made = PriorObjective(recipe, frozen=small_parts(32, 8), pictures=RandomPictures(32))
    batch = made.batch(0, 64)
    assert float(batch.embeddings.mean()) == pytest.approx(0, abs=0.2)
    assert float(batch.embeddings.std()) == pytest.approx(1, abs=0.2)
    empty = made._read([""])[0][0]
    gone = torch.isclose(batch.text[0], empty, atol=1e-5).all(1)
    assert 20 < int(gone.sum()) < 44
    loss, _ = made.loss(made.module, batch)
    # x0-prediction: a network that says zero has the embeddings' own variance as its loss.
    zero = made._error(lambda x, t, *text: torch.zeros_like(x), batch)  # type: ignore[arg-type]
    torch.testing.assert_close(zero, batch.embeddings.square().mean(1))
    loss.backward()
    assert made.module.clip_mean.grad is None
