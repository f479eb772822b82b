"""A loaded unCLIP model written as a folder: whole, with its statistics and its prior."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableUnCLIPImg2ImgPipeline, StableUnCLIPPipeline

from reference_pipelines import WIDTH, prior_pipeline, unclip_pipeline
from safelight.cli.main import main
from safelight.cli.models import write
from safelight.errors import WeightsError
from safelight.model import Model
from systems_micro import close, drawing, extra_noise, first_noise, latents_of, loaded, photo

PROMPT = "abc on top of xyz"
SHAPE = (1, 4, 16, 8)
SIZE: dict[str, Any] = {"width": 16, "height": 32}
GIVEN: dict[str, Any] = {"prompt": PROMPT, "steps": 3, "seed": 3, **SIZE}
KARLO = {
    "prior": "prior",
    "prior_text_encoder": "text_encoder",
    "prior_tokenizer": "tokenizer",
    "prior_scheduler": "prior_scheduler",
}


def chain(tmp_path: Path) -> Model:
    """unCLIP that looks at pictures, with a prior from a folder of its own in front."""
    whole = tmp_path / "whole"
    prior_pipeline("ddim").save_pretrained(whole)
    karlo = tmp_path / "karlo"
    karlo.mkdir()
    for ours, theirs in KARLO.items():
        (whole / ours).rename(karlo / theirs)
    return loaded(unclip_pipeline("ddim"), tmp_path / "plain", prior=karlo)


def theirs(pipeline: Any, monkeypatch: pytest.MonkeyPatch, *first: Any, **more: Any) -> Any:
    """The reference's latents, on the noise of seed 3."""
    pipeline.set_progress_bar_config(disable=True)
    draws = [extra_noise(3, "embedding", WIDTH)[None], first_noise(3, *SHAPE)]
    if "prior_num_inference_steps" in more:
        # One step, to t = 0, draws nothing more.
        draws.insert(0, extra_noise(3, "prior", 1, WIDTH))
    with drawing(monkeypatch, *draws):
        return pipeline(*first, **SIZE, num_inference_steps=3, output_type="latent", **more).images


def test_a_chain_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(tmp_path)
    assert model.prior is not None
    model.prior.spec = model.prior.spec.replace(steps=7)
    model.spec = model.spec.replace(prior=model.prior.spec)
    write(model, tmp_path / "out")
    again = Model.load(tmp_path / "out", device="cpu")
    assert again.spec == model.spec
    assert again.prior is not None
    assert again.normaliser is not None
    for part, net in {**model.networks, "prior": model.prior.net, "p": model.prior.text}.items():
        back = {**again.networks, "prior": again.prior.net, "p": again.prior.text}[part]
        for name, tensor in net.state_dict().items():
            assert torch.equal(back.state_dict()[name], tensor), f"{part} {name}"
    assert all(torch.equal(*pair) for pair in zip(again.normaliser, model.normaliser, strict=True))
    wanted = latents_of(model, **GIVEN)
    assert torch.equal(latents_of(again, **GIVEN), wanted)
    # The reference reads it, from text and from pictures.
    text = StableUnCLIPPipeline.from_pretrained(tmp_path / "out")
    made = theirs(text, monkeypatch, PROMPT, prior_num_inference_steps=1)
    close(latents_of(again, **{**GIVEN, "prior_steps": 1}), made)
    pictures = StableUnCLIPImg2ImgPipeline.from_pretrained(tmp_path / "out")
    made = theirs(pictures, monkeypatch, photo(40, 24), PROMPT)
    close(latents_of(again, image=photo(40, 24), **GIVEN), made)


def test_a_damaged_prior_is_found(tmp_path: Path) -> None:
    write(chain(tmp_path), tmp_path / "out")
    file = tmp_path / "out" / "prior" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match=r"prior.*does not have the SHA-256"):
        Model.load(tmp_path / "out", device="cpu")


def test_statistics_are_written_and_stay_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(unclip_pipeline("ddim"), tmp_path / "in")
    write(model, tmp_path / "out", "float16")
    again = Model.load(tmp_path / "out", device="cpu")
    assert model.normaliser is not None
    assert again.normaliser is not None
    assert all(torch.equal(*pair) for pair in zip(again.normaliser, model.normaliser, strict=True))
    model.normaliser = None  # as of CLIP H: nothing to change
    write(model, tmp_path / "plain")
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(tmp_path / "plain")
    made = theirs(pipeline, monkeypatch, photo(40, 24), PROMPT, noise_level=300)
    ours = {**GIVEN, "image": photo(40, 24), "noise_level": 300}
    close(latents_of(model, **ours), made)
    close(latents_of(Model.load(tmp_path / "plain", device="cpu"), **ours), made)


def test_export_puts_a_prior_in_front(tmp_path: Path) -> None:
    model = chain(tmp_path)
    for folder, arguments in (("out", ["--prior", tmp_path / "karlo"]), ("alone", [])):
        line = ["models", "export", tmp_path / "plain", tmp_path / folder, *arguments]
        with pytest.raises(SystemExit) as leaving:
            main([str(word) for word in line])
        assert not leaving.value.code
    again = Model.load(tmp_path / "out", device="cpu")
    assert torch.equal(latents_of(again, **GIVEN), latents_of(model, **GIVEN))
    assert Model.load(tmp_path / "alone", device="cpu").prior is None
