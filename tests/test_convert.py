"""Single files and folders: conversion both ways, overrides, tokenizers, against diffusers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from safelight import presets
from safelight.cli.main import main
from safelight.convert import convert
from safelight.errors import InvalidRequest, WeightsError
from safelight.generate import Generator
from safelight.model import Model
from safelight.spec import ModelSpec, TextSpec, UNetSpec, VAESpec
from safelight.store.folder import read_folder
from safelight.store.hub import packaged_tokenizer
from safelight.store.single_file import write_single_file
from safelight.text.tokenizer import Tokenizer
from store.store_micro import byte_vocab, make_pipeline, make_text, make_tokenizer, make_unet

V2 = {"use_linear_projection": True, "attention_head_dim": [2, 4]}


def scheduler(prediction: str = "epsilon") -> DDIMScheduler:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(
        **betas,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


@pytest.fixture(params=["v1", "v2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    v2 = request.param == "v2"
    pipeline = make_pipeline(scheduler("v_prediction" if v2 else "epsilon"), **(V2 if v2 else {}))
    if v2:
        pipeline.register_modules(tokenizer=make_tokenizer("!"))
    pipeline.save_pretrained(tmp_path / "micro")
    return tmp_path / "micro"


def picture(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipeline("a cat!", num_inference_steps=2, generator=generator, output_type="np").images


def weights(folder: Path) -> dict[str, torch.Tensor]:
    contents = read_folder(folder)
    return {f"{p}.{n}": t for p, state in contents.tensors.items() for n, t in state.items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name


def test_there_and_back_is_equal_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    done = convert(folder, tmp_path / "x.safetensors")
    assert done["family"] in ("sd-v1", "sd-v2")
    convert(tmp_path / "x.safetensors", tmp_path / "back", tokenizer=folder / "tokenizer")
    assert_equal(weights(folder), weights(tmp_path / "back"))
    convert(tmp_path / "back", tmp_path / "y.safetensors")
    assert_equal(load_file(tmp_path / "x.safetensors"), load_file(tmp_path / "y.safetensors"))
    # and diffusers makes the same picture of it
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "back", safety_checker=None)
    original = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert np.array_equal(picture(loaded), picture(original))


def test_diffusers_single_file_loader_takes_what_we_write(tmp_path: Path) -> None:
    folder = tmp_path / "micro"
    make_pipeline(scheduler()).save_pretrained(folder)
    convert(folder, tmp_path / "x.safetensors")
    loaded = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "x.safetensors"), config=str(folder), local_files_only=True
    )
    original = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for part in ("unet", "vae", "text_encoder"):
        assert_equal(getattr(loaded, part).state_dict(), getattr(original, part).state_dict())
    assert np.array_equal(picture(loaded), picture(original))


def test_a_single_file_makes_the_folder_s_pictures(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "micro.safetensors")
    one = Model.load(tmp_path / "micro.safetensors", device="cpu", tokenizer=folder / "tokenizer")
    other = Model.load(folder, device="cpu")
    assert one.spec == other.spec
    assert one.tokenizer is not None
    assert other.tokenizer is not None
    assert one.tokenizer.pad_id == other.tokenizer.pad_id
    images = [Generator(m).generate("a cat!", seed=1, steps=2)[0].image for m in (one, other)]
    assert np.array_equal(np.asarray(images[0]), np.asarray(images[1]))


# -- files as they were published ---------------------------------------------------------------


def micro_preset(monkeypatch: pytest.MonkeyPatch) -> tuple[ModelSpec, dict[str, Any]]:
    """v1 with everything small but the context, which tells the families apart."""
    spec = ModelSpec(
        name="sd-v1",
        unet=UNetSpec(
            sample_size=8,
            channels=(8, 16, 16, 16),
            attention=(True, False, False, False),
            heads=(2,) * 4,
            layers_per_block=1,
            norm_groups=4,
        ),
        vae=VAESpec(channels=(8, 16), layers_per_block=1, norm_groups=4, sample_size=16),
        text=TextSpec(
            vocab_size=514, layers=1, heads=2, mlp_width=24, context_length=16,
            bos_id=512, eos_id=513, pad_id=513,
        ),
    )  # fmt: skip
    states: dict[str, Any] = {
        "unet": make_unet(
            cross_attention_dim=768,
            block_out_channels=(8, 16, 16, 16),
            down_block_types=("CrossAttnDownBlock2D", *["DownBlock2D"] * 3),
            up_block_types=(*["UpBlock2D"] * 3, "CrossAttnUpBlock2D"),
        ).state_dict(),
        "vae": make_pipeline().vae.state_dict(),
        "text": {
            f"text_model.{k}": v
            for k, v in make_text(hidden_size=768, num_hidden_layers=1).state_dict().items()
        },
    }
    # Detection must find the one layer itself.
    deeper = spec.replace(unet=spec.unet.replace(layers_per_block=2))
    monkeypatch.setattr(presets, "SD_V1", deeper)
    return spec, states


def as_published(path: Path, spec: ModelSpec, states: dict[str, Any]) -> dict[str, Any]:
    """A file without our notes in it."""
    write_single_file(path, spec, states)
    tensors = load_file(path)
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_published_file_is_told_from_its_tensors(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, states = micro_preset(monkeypatch)
    tensors = as_published(tmp_path / "x.safetensors", spec, states)
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    options = {"device": "cpu", "tokenizer": tmp_path / "tokenizer"}
    path = tmp_path / f"x.{ending}"
    if ending == "ckpt":
        averages = {
            "model_ema." + n[6:].replace(".", ""): t + 1
            for n, t in tensors.items()
            if n.startswith("model.")
        }
        torch.save({"state_dict": tensors | averages, "global_step": 1}, path)
    model = Model.load(path, **options)
    shift = 1 if ending == "ckpt" else 0
    bias = states["unet"]["conv_in.bias"]
    assert torch.equal(model.unet.conv_in.bias, bias + shift)
    assert model.spec.unet == spec.unet
    if ending == "ckpt":
        assert torch.equal(Model.load(path, ema=False, **options).unet.conv_in.bias, bias)
    changed = Model.load(path, prediction_type="v", family="sd-v2", **options)
    assert (changed.spec.schedule.prediction_type, changed.spec.family) == ("v", "sd-v2")
    with pytest.raises(WeightsError, match=r"does not fit UNet|no single-file layout"):
        Model.load(path, layers=2, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"family": "sdxl"}, "family: 'sdxl' is unknown"),
        ({"prediction_type": "x0"}, "prediction_type"),
        ({"clip_stats": "x.th"}, "clip_stats: a sd-v1 has no use"),
        ({"ema": True}, "has no moving average"),
        ({"colour": 3}, "colour: is not an argument"),
        ({"tokenizer": "nowhere"}, "tokenizer: no file or folder nowhere"),
        ({}, "tokenizer: x.safetensors holds none.*--tokenizer FOLDER.*open_clip_torch"),
    ],
)
def test_wrong_overrides(
    options: dict[str, Any], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, states = micro_preset(monkeypatch)
    as_published(tmp_path / "x.safetensors", spec, states)
    with pytest.raises(InvalidRequest, match=match):
        Model.load(tmp_path / "x.safetensors", device="cpu", **options)


def test_overrides_are_for_single_files(tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path / "micro")
    with pytest.raises(InvalidRequest, match="is for original single files"):
        Model.load(tmp_path / "micro", ema=True)
    with pytest.raises(InvalidRequest, match="is for original single files"):
        Model.load("tiny", ema=True)


# -- tokenizers ---------------------------------------------------------------------------------


def merges_file(place: Path, merges: list[str]) -> Path:
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("raise RuntimeError('imported')")
    path = place / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress("\n".join(["#version", *merges, ""]).encode()))
    return path


def test_an_installed_package_s_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packaged_tokenizer() is None
    path = merges_file(tmp_path / "open_clip", ["c a", "ca t</w>"])
    monkeypatch.syspath_prepend(tmp_path)
    assert packaged_tokenizer() == path
    vocab = [t for t, i in sorted(byte_vocab().items(), key=lambda pair: pair[1])]
    expected = [*vocab[:512], "ca", "cat</w>", *vocab[512:]]
    found = Tokenizer.from_bpe(path, pad_id=0)
    assert [t for t, i in sorted(found.vocab.items(), key=lambda pair: pair[1])] == expected
    assert found.encode("a Cat") == [expected.index("a</w>"), expected.index("cat</w>")]
    assert (found.pad_id, found.context_length) == (0, 77)
    path.write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(WeightsError, match="no list of CLIP's merges"):
        Tokenizer.from_bpe(path)


def test_another_model_s_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "micro.safetensors")
    path = merges_file(tmp_path / "other", ["c a"])
    with pytest.raises(InvalidRequest, match="has 515 tokens, but micro"):
        Model.load(tmp_path / "micro.safetensors", tokenizer=path)


# -- the command --------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as leaving:
            main([str(a) for a in arguments])
        return int(leaving.value.code or 0)

    folder = tmp_path / "micro"
    make_pipeline(scheduler()).save_pretrained(folder)
    file, back = tmp_path / "x.safetensors", tmp_path / "back"
    assert run("models", "convert", folder, file, "--json") == 0
    assert json.loads(capsys.readouterr().out)["family"] == "sd-v1"
    assert run("models", "convert", file, back) == 2
    assert "--tokenizer FOLDER" in capsys.readouterr().err
    assert not back.exists()
    tokenizer = ("--tokenizer", folder / "tokenizer")
    assert run("models", "convert", file, back, *tokenizer, "--dtype", "float16") == 0
    assert {t.dtype for t in weights(back).values()} == {torch.float16}
    assert run("models", "convert", file, back, *tokenizer) == 2
    assert "is there already" in capsys.readouterr().err
    assert run("models", "convert", folder, tmp_path / "other") == 2
    assert run("models", "convert", file, tmp_path / "x.ckpt") == 2
    assert run("models", "convert", tmp_path / "none", back) == 2
    out = tmp_path / "out.png"
    steps = ("--steps", 1, "-o", out, "-q", "--device", "cpu")
    assert run("generate", "a cat", "-m", file, *tokenizer, *steps) == 0
    assert out.is_file()
