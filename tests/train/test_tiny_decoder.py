"""A tiny decoder learns from a big one, is exported, packed into a family, and shipped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safelight import shipped
from safelight.errors import InvalidRequest
from safelight.model import Model
from safelight.nets.tiny_decoder import TinyDecoder
from safelight.nets.vae import VAE
from safelight.parts import load_tiny_decoder
from safelight.spec import TinyDecoderSpec, VAESpec
from safelight.train.loop import Run
from safelight.train.pack import _taught, pack_decoder
from safelight.train.recipe import Recipe, read_recipe
from safelight.train.tiny_decoder import TinyDecoderObjective

BIG = VAESpec(channels=(8, 8), layers_per_block=1, norm_groups=4, scaling_factor=0.5)


def recipe(folder: Path, images: int, blocks: tuple[int, ...] = (1, 1)) -> Recipe:
    big = folder / "big"
    if not big.exists():
        big.mkdir()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_file(VAE(BIG).state_dict(), big / "vae.safetensors")
        (big / "vae.json").write_text(BIG.model_dump_json())
    return Recipe.model_validate(
        {
            "name": "micro",
            "output": folder / f"run{images}",
            "images": images,
            "data": {"size": 16, "count": 64, "cache": folder / "renders"},
            "optim": {"batch": 8, "lr": 3e-3},
            "decoder": {
                "vae": big,
                "decoder": {"channels": (8,) * len(blocks), "blocks": blocks},
            },
        }
    )


def test_it_comes_closer_to_the_big_decoders_pictures(tmp_path: Path) -> None:
    short, long = (recipe(tmp_path, images) for images in (8, 640))
    before = Run(short, TinyDecoderObjective(short)).go()["psnr_val"]
    after = Run(long, TinyDecoderObjective(long)).go()["psnr_val"]
    assert after > before + 3
    made = load_tiny_decoder(tmp_path / "run640")
    assert made.spec == TinyDecoderSpec(channels=(8, 8), blocks=(1, 1))
    objective = TinyDecoderObjective(long)
    latents, wanted = objective.batch(0, 4)
    assert torch.equal(latents, objective.batch(0, 4)[0]), "a batch is a function of its place"
    with torch.no_grad():
        assert torch.allclose(wanted, objective.vae.decode(latents).clamp(-1, 1), atol=1e-6)


def test_one_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"decoder\.blocks"):
        TinyDecoderObjective(recipe(tmp_path, 8, blocks=(1, 1, 1)))


def test_the_shipped_recipe_fits_the_family() -> None:
    settings = read_recipe("recipes/tiny/decoder.toml").decoder
    assert settings is not None
    vae = VAESpec.model_validate_json((shipped.FAMILY / "shared" / "vae.json").read_text())
    assert settings.decoder.factor == vae.factor
    assert settings.decoder.latent_channels == vae.latent_channels


def test_packed_it_ships_with_every_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = tmp_path / "family"
    for name in ("shared", "tiny", "tiny-v"):
        shutil.copytree(shipped.FAMILY / name, family / name)
    run = recipe(tmp_path, 8, blocks=(1, 1))
    made = TinyDecoderObjective(run)
    made.settings = made.settings.replace(
        decoder=TinyDecoderSpec(channels=(8,) * 4, blocks=(1, 1, 1, 1))
    )
    made.module = TinyDecoder(made.settings.decoder)
    out = tmp_path / "run"
    out.mkdir()
    made.export(made.module, out)
    assert pack_decoder(out, family) == ["tiny", "tiny-v"]
    monkeypatch.setattr(shipped, "FAMILY", family)
    model = Model.load("tiny-v", device="cpu")
    assert model.tiny_decoder is not None
    latents = torch.randn(1, 4, 4, 4)
    with torch.inference_mode():
        expected = made.module(latents)
        assert torch.allclose(model.tiny_decoder(latents), expected, atol=2e-3)  # float16
    assert model.runtime.sketch(latents).shape == (1, 3, 32, 32)

    _taught("tiny", Path("elsewhere/tiny-v"), family)
    card = json.loads((family / "tiny-v" / "model.json").read_text())
    assert card["spec"]["student"] == "tiny"
    assert shipped.student("tiny-v") == "tiny"
    assert shipped.student("tiny") == ""
