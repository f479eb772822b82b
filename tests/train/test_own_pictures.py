"""Autoencoders and CLIPs trained on pictures of one's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from safelight.errors import InvalidRequest
from safelight.parts import load_text, load_vae, load_vision
from safelight.text.tokenizer import Tokenizer
from safelight.train.autoencoder import AutoencoderObjective
from safelight.train.contrastive import contrast, matched
from safelight.train.loop import Run
from safelight.train.objectives import objective
from safelight.train.pairs import PairsObjective
from safelight.train.recipe import Recipe

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30), "grey": (90,) * 3}


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """40 pictures with a stripe, in four colours, whose captions name the colour."""
    folder = tmp_path / "album"
    folder.mkdir()
    for k in range(40):
        name, colour = list(COLOURS.items())[k % 4]
        picture = np.full((20, 24, 3), colour, np.uint8)
        picture[:, k % 20 : k % 20 + 3] = 255
        Image.fromarray(picture).save(folder / f"{k:02}.png")
        (folder / f"{k:02}.txt").write_text(f"a {name} wall, painted {name}")
    (folder / "99.png").write_bytes(b"no picture")
    (folder / "99.txt").write_text("a wall")
    return folder


def recipe(album: Path, output: Path, images: int, **sections: Any) -> Recipe:
    data = {"source": str(album), "size": 16, "hold_out": 0.2, **sections.pop("data", {})}
    return Recipe.model_validate(
        {
            "name": "own",
            "output": output,
            "images": images,
            "sample_every": images,
            "data": data,
            "optim": {"batch": 8, "lr": 3e-3, "decay": 0.0},
            "ema": {"decay": 0.5},
            **sections,
        }
    )


SMALL = {"channels": [8, 8], "layers_per_block": 1, "norm_groups": 4, "scaling_factor": 0.7}


def test_an_autoencoder_learns_pictures_without_captions(album: Path, tmp_path: Path) -> None:
    for path in album.glob("*.txt"):
        path.unlink()
    made: Any = AutoencoderObjective(recipe(album, tmp_path / "vae", 240, vae={"vae": SMALL}))
    before = made.validate(made.module)
    numbers = Run(made.recipe, made).go()
    assert numbers["psnr_val"] > before["psnr_val"] + 3
    loaded = load_vae(tmp_path / "vae")
    assert loaded.spec.scaling_factor == pytest.approx(1 / numbers["latent_std"], rel=1e-3)
    assert Image.open(tmp_path / "vae" / "samples-00000240.png").size == (12 * 32, 4 * 32)
    listed = json.loads((tmp_path / "vae" / "data.json").read_text())
    assert [e["key"] for e in listed["skipped_listed"]] == ["99.png"]

    # The decoder alone, from there on, on squared error: latents stay what they are.
    tuned = {"vae": loaded.spec.model_dump(), "freeze_encoder": True, "l1": 0, "mse": 1}
    again = recipe(album, tmp_path / "ft", 40, vae=tuned, start=tmp_path / "vae")
    tuning: Any = AutoencoderObjective(again)
    Run(again, tuning).go()
    after = load_vae(tmp_path / "ft")
    assert after.spec == loaded.spec
    same = {
        name.split(".")[0]: torch.equal(value, loaded.state_dict()[name])
        for name, value in after.state_dict().items()
        if name.endswith("weight") and ("conv_in" in name or "quant_conv" in name)
    }
    assert same == {
        "encoder": True,
        "quant_conv": True,
        "decoder": False,
        "post_quant_conv": False,
    }


def test_where_nothing_is_held_out_an_autoencoder_says_less(album: Path, tmp_path: Path) -> None:
    data = {"hold_out": 0.0}
    made = AutoencoderObjective(recipe(album, tmp_path, 8, vae={"vae": SMALL}, data=data))
    assert set(made.validate(made.module)) == {"latent_std"}


def towers(words: int = 530, **changes: Any) -> dict[str, Any]:
    text = {
        "vocab_size": words,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "mlp_width": 32,
        "context_length": 16,
        "projection_width": 16,
        "bos_id": words - 2,
        "eos_id": words - 1,
        "pad_id": words - 1,
    }
    vision = {
        "image_size": 16,
        "patch_size": 4,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "mlp_width": 32,
        "projection_width": 16,
    }
    return {"text": text, "vision": vision, **changes}


def test_a_clip_learns_which_caption_is_whose(album: Path, tmp_path: Path) -> None:
    asked = recipe(album, tmp_path / "clip", 400, clip=towers())
    made = objective(asked)
    assert isinstance(made, PairsObjective)
    before = made.validate(made.module)
    first, again = made.batch(8, 8), made.batch(8, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    numbers = Run(asked, made).go()  # type: ignore[arg-type]
    assert before["top1_val"] < 0.6
    assert numbers["top1_val"] > 0.9, "the colour is in the picture and in the caption"
    assert numbers["loss_val"] < before["loss_val"] - 0.5
    tower, tokenizer = load_text(tmp_path / "clip")
    assert load_vision(tmp_path / "clip").spec.image_size == 16
    assert tower.spec.vocab_size == tokenizer.vocab_size == 530
    assert (tmp_path / "clip" / "samples-00000400.png").exists()

    # Another run with the vocabulary of that one, though its captions say other words.
    for path in album.glob("*.txt"):
        path.write_text("something else entirely")
    given = towers(tokenizer=tmp_path / "clip" / "tokenizer")
    other = PairsObjective(recipe(album, tmp_path / "other", 8, clip=given))
    assert other.tokenizer.tokens(["a red wall"]) == tokenizer.tokens(["a red wall"])


def test_the_contrastive_loss_is_transformers() -> None:
    torch.manual_seed(0)
    image, text = torch.randn(6, 8), torch.randn(6, 8)
    loss, similarity = contrast(image, text, torch.tensor(10.0))
    torch.testing.assert_close(loss, image_text_contrastive_loss(similarity.T))
    equal, _ = contrast(torch.ones(5, 3), torch.ones(5, 3), torch.tensor(7.0))
    assert float(equal) == pytest.approx(math.log(5))
    table = torch.tensor([[0.0, 1.0, 0.0], [2.0, 1.0, 0.0], [5.0, 0.0, 1.0]])
    assert matched(table, ["a", "a", "b"]) == pytest.approx(2 / 3), "alike captions are both right"


def test_what_a_clip_cannot_learn_from_is_named(album: Path, tmp_path: Path) -> None:
    def refused(**sections: Any) -> InvalidRequest:
        with pytest.raises(InvalidRequest) as caught:
            PairsObjective(recipe(album, tmp_path / "clip", 8, **sections))
        return caught.value

    wrong = refused(clip=towers(600))
    assert wrong.field == "clip.text.vocab_size"
    have = int(str(wrong).split("vocab_size = ")[1].split(",")[0])
    assert 514 < have < 600, "there are not so many words in the captions"
    PairsObjective(recipe(album, tmp_path / "clip", 8, clip=towers(have)))  # what it said to write
    assert refused(clip=towers(), data={"size": 24}).field == "data.size"
    assert refused(clip=towers(), data={"captions": "optional"}).field == "data.captions"
    Tokenizer.from_vocab({"<|startoftext|>": 0, "<|endoftext|>": 1}, []).save(tmp_path / "words")
    assert refused(clip=towers(tokenizer=tmp_path / "words")).field == "clip.text.vocab_size"
    for path in album.glob("*.txt"):
        path.unlink()
    bare = refused(clip=towers())
    assert bare.field == "data.source"
    assert "has no captions" in str(bare)
