"""Code written for diffusers, with only the import and the path changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import safelight
from micro_models import micro_model
from safelight import compat
from safelight.cli.models import write
from safelight.errors import InvalidRequest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compat") / "micro"
    write(micro_model(), path)
    return path


def test_a_face_makes_the_picture_that_generate_makes(folder: Path) -> None:
    pipe = compat.StableDiffusionPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(7)
    ours = safelight.load(folder).generate("a cube", seed=7, count=2, steps=3, guidance_scale=4)
    out = pipe(
        "a cube",
        num_inference_steps=3,
        guidance_scale=4,
        generator=generator,
        num_images_per_prompt=2,
    )
    assert [r.seed for r in out.results] == [7, 8]
    for mine, theirs in zip(ours, out.images, strict=True):
        assert mine.image is not None
        assert np.array_equal(np.asarray(mine.image), np.asarray(theirs))
    assert out["sample"] == out["images"] == out.images == out[0]
    images, flags = pipe("a cube", num_inference_steps=1, return_dict=False)
    assert len(images) == 1
    assert flags is None


def test_swapping_the_scheduler_by_its_config(folder: Path) -> None:
    pipe = compat.StableDiffusionPipeline.from_pretrained(folder)
    plain = pipe.scheduler
    assert plain.config["prediction_type"] == "epsilon"
    pipe.scheduler = compat.EulerDiscreteScheduler.from_config(plain.config, use_karras_sigmas=True)
    request = pipe("a cube", num_inference_steps=3).results[0].request
    assert (request.sampler, request.schedule) == ("euler", "karras")


def test_a_scheduler_of_diffusers_itself(folder: Path) -> None:
    from diffusers import DDIMScheduler, ScoreSdeVeScheduler

    pipe = compat.StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert pipe("a cube", num_inference_steps=2).results[0].request.sampler == "ddim"
    with pytest.raises(InvalidRequest, match="ScoreSdeVeScheduler is not supported"):
        pipe.scheduler = ScoreSdeVeScheduler()


@pytest.mark.parametrize(
    ("kind", "order", "sampler"),
    [("dpmsolver++", 2, "dpm++2m"), ("sde-dpmsolver++", 3, "dpm++3m-sde")],
)
def test_the_multistep_family(kind: str, order: int, sampler: str) -> None:
    scheduler = compat.DPMSolverMultistepScheduler(algorithm_type=kind, solver_order=order)
    assert scheduler.sampler == sampler
    with pytest.raises(InvalidRequest, match="not supported"):
        compat.DPMSolverMultistepScheduler(algorithm_type=kind, solver_order=1)


def test_what_it_cannot_do_it_says(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="custom_pipeline"):
        compat.StableDiffusionPipeline.from_pretrained(folder, custom_pipeline="x")
    pipe = compat.StableDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(InvalidRequest, match="cross_attention_kwargs"):
        pipe("a cube", cross_attention_kwargs={"scale": 1})
    with pytest.raises(InvalidRequest, match="generators for 2 pictures"):
        pipe(["a", "b"], generator=[torch.Generator()])
    with pytest.raises(InvalidRequest, match="output_type"):
        pipe("a cube", output_type="latent")
