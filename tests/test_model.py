"""Models: published folders load, and the whole river agrees with diffusers' pipeline."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from safelight.errors import InvalidRequest, ModelNotFound, SafelightError, WeightsError
from safelight.generate import Generator
from safelight.model import Model

sys.path.insert(0, str(Path(__file__).parent / "store"))
from store_micro import make_pipeline

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "pndm": None,
    "ddim": DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "ddim-v": DDIMScheduler(
        **BETAS,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    ),
    "dpm": DPMSolverMultistepScheduler(**BETAS),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_published_folder_gives_the_reference_picture(tmp_path: Path, scheduler: str) -> None:
    pipeline = make_pipeline(SCHEDULERS[scheduler])
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["abc on top of xyz", "q"]
    expected = pipeline(
        prompts,
        negative_prompt=["no", ""],
        num_inference_steps=7,
        guidance_scale=5.0,
        height=32,
        width=16,
        generator=[torch.Generator().manual_seed(s) for s in (5, 6)],
        output_type="np",
    ).images
    model = Generator(Model.load(tmp_path, device="cpu"))
    for i, prompt in enumerate(prompts):
        (result,) = model.generate(
            prompt,
            negative_prompt=["no", ""][i],
            steps=7,
            guidance_scale=5.0,
            height=32,
            width=16,
            seed=5 + i,
        )
        assert result.image is not None
        ours = np.asarray(result.image, dtype=np.float64)
        assert np.abs(ours - 255 * expected[i]).max() <= 1.0, "rounding, and nothing else"


def test_another_seed_is_another_picture(tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path)
    model = Generator(Model.load(tmp_path, device="cpu"))
    a, b = (
        np.asarray(model.generate("abc", steps=3, seed=seed)[0].image, dtype=int) for seed in (1, 2)
    )
    assert np.abs(a - b).max() > 2


def test_export_round_trip_through_diffusers(tmp_path: Path) -> None:
    from safelight.cli.models import write

    make_pipeline(SCHEDULERS["dpm"]).save_pretrained(tmp_path / "a")
    model = Model.load(tmp_path / "a", device="cpu")
    write(model, tmp_path / "b", "float32")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "b")
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "abc", num_inference_steps=5, generator=torch.Generator().manual_seed(3), output_type="np"
    ).images[0]
    (result,) = Generator(model).generate("abc", steps=5, guidance_scale=7.5, seed=3)
    assert np.abs(np.asarray(result.image, dtype=np.float64) - 255 * expected).mean() <= 1.0


def test_names_that_nothing_answers_to() -> None:
    with pytest.raises(ModelNotFound, match="tiny"):
        Model.load("no-such-model", device="cpu", local_only=True)


def test_devices_and_dtypes_are_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="device"):
        Model.load("tiny", device="gpu9")
    with pytest.raises(InvalidRequest, match="dtype"):
        Model.load("tiny", device="cpu", dtype="float13")
    half = Model.load("tiny", device="cpu", dtype="float16")
    assert half.dtype == torch.float32
    assert "runs in float32" in half.notes[0]
    assert not any("float32" in note for note in Model.load("tiny", device="cpu").notes)


def test_a_damaged_folder_is_one_clear_error(tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="diffusion_pytorch_model"):
        Model.load(tmp_path, device="cpu")


def test_errors_are_one_family() -> None:
    for kind in (InvalidRequest, ModelNotFound, WeightsError):
        assert issubclass(kind, SafelightError)
