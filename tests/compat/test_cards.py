"""The five cards' own lines, with only the import, the path and the download changed.

What a card publishes stands here as it is written there; :func:`lines` changes what it must, and
fails where there is nothing to change. The two cards that publish tables of parameters instead of
lines go through ``safelight.load(...).generate(**parameters)``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import safelight
from reference_pipelines import unclip_pipeline, variations_pipeline
from safelight.compat import DPMSolverMultistepScheduler
from safelight.errors import InvalidRequest
from safelight.generate import Generator
from safelight.request import GenerateRequest
from safety_micro import rigged
from systems_micro import loaded, make_pipeline, photo

CPU = {'pipe.to("cuda")': 'pipe.to("cpu")'}


def lines(card: str, changes: dict[str, str]) -> dict[str, Any]:
    """Run a card's lines with these changes; its variables."""
    for was, becomes in changes.items():
        assert card.count(was) == 1, was
        card = card.replace(was, becomes)
    names: dict[str, Any] = {}
    exec(compile(card, "card", "exec"), names)
    return names


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a picture in it."""
    monkeypatch.chdir(tmp_path)
    photo(40, 24).save("picture.jpg")
    return tmp_path


# -- 000: image variations -------------------------------------------------------------------------

VARIATIONS = """
from pathlib import Path
from lambda_diffusers import StableDiffusionImageEmbedPipeline
from PIL import Image
import torch

device = "cuda" if torch.cuda.is_available() else "cpu"

pipe = StableDiffusionImageEmbedPipeline.from_pretrained("lambdalabs/sd-image-variations-diffusers")
pipe = pipe.to(device)

im = Image.open("your/input/image/here.jpg")

num_samples = 4
image = pipe(num_samples*[im], guidance_scale=3.0)
image = image["sample"]

base_path = Path("outputs/im2im")
base_path.mkdir(exist_ok=True, parents=True)
for idx, im in enumerate(image):
    im.save(base_path/f"{idx:06}.jpg")
"""


def test_image_variations(desk: Path) -> None:
    variations_pipeline("pndm").save_pretrained("model")
    names = lines(
        VARIATIONS,
        {
            "from lambda_diffusers import": "from safelight.compat import",
            '"lambdalabs/sd-image-variations-diffusers"': '"model"',
            "your/input/image/here.jpg": "picture.jpg",
        },
    )
    files = sorted((desk / "outputs" / "im2im").iterdir())
    assert [file.name for file in files] == [f"{k:06}.jpg" for k in range(4)]
    assert len({np.asarray(image).tobytes() for image in names["image"]}) == 4
    request = names["pipe"](photo(40, 24), guidance_scale=3.0).results[0].request
    assert (request.steps, request.guidance_scale, request.sampler) == (50, 3.0, "pndm")
    assert {Image.open(file).size for file in files} == {(16, 16)}


# -- 001: unCLIP -----------------------------------------------------------------------------------

UNCLIP = """
import requests
import torch
from PIL import Image
from io import BytesIO

from diffusers import StableUnCLIPImg2ImgPipeline

#Start the StableUnCLIP Image variations pipeline
pipe = StableUnCLIPImg2ImgPipeline.from_pretrained(
    "stabilityai/stable-diffusion-2-1-unclip", torch_dtype=torch.float16, variation="fp16"
)
pipe = pipe.to("cuda")

#Get image from URL
url = "https://huggingface.co/datasets/hf-internal-testing/diffusers-images/resolve/main/stable_unclip/tarsila_do_amaral.png"

response = requests.get(url)
init_image = Image.open(BytesIO(response.content)).convert("RGB")

#Pipe to make the variation
images = pipe(init_image).images
images[0].save("tarsila_variation.png")
"""


@pytest.mark.parametrize("variant", ["fp16", None])
def test_unclip(desk: Path, variant: str | None) -> None:
    unclip_pipeline("ddim").save_pretrained("model", variant=variant)
    names = lines(
        UNCLIP,
        {
            "import requests\n": "",
            "from diffusers import": "from safelight.compat import",
            '"stabilityai/stable-diffusion-2-1-unclip"': '"model"',
            "response = requests.get(url)\n": "",
            "BytesIO(response.content)": '"picture.jpg"',
            **CPU,
        },
    )
    assert Image.open(desk / "tarsila_variation.png").size == (16, 16)
    (result,) = names["pipe"](names["init_image"]).results
    asked = result.request
    assert (asked.steps, asked.guidance_scale, asked.noise_level) == (20, 10.0, 0)
    assert asked.sampler == "ddim"
    # "We are swapping it to DPMSolverMultistepScheduler", the text says; the lines do not.
    pipe = names["pipe"]
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert pipe(names["init_image"]).results[0].request.sampler == "dpm++2m"


# -- 002: v1-4 with DeepInfra's parameters ---------------------------------------------------------

DEEPINFRA: dict[str, Any] = {
    "prompt": "abc on top of xyz",
    "negative_prompt": "",
    "num_images": 1,
    "num_inference_steps": 25,
    "guidance_scale": 7.5,
    "width": 128,
    "height": 128,
    "seed": None,
    "use_compel": False,
    "lora": "",
    "lora_scale": 1,
}
"""Its fields with their defaults; the size is the smallest of the 13 that it offers."""


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cards") / "v1"
    loaded(make_pipeline(), folder)
    return folder


def test_deepinfras_table(v1: Path, desk: Path) -> None:
    model = safelight.load(v1)
    (result,) = model.generate(**DEEPINFRA)
    assert result.outcome == "ok"
    assert (result.request.steps, result.request.guidance_scale) == (25, 7.5)
    assert result.image is not None
    assert result.image.size == (128, 128)
    assert (result.request.weighting, result.request.loras) == ("none", ())
    small = {**DEEPINFRA, "width": 16, "height": 16, "num_inference_steps": 2, "seed": 4}
    four = model.generate(**{**small, "num_images": 4})
    assert [each.seed for each in four] == [4, 5, 6, 7]
    (weighted,) = model.generate(**{**small, "prompt": "abc++ on", "use_compel": True})
    assert weighted.request.weighting == "compel"
    started = {**small, "image": "picture.jpg", "strength": 0.8}
    assert model.generate(**started)[0].request.strength == 0.8
    (given,) = model.generate(**{**started, "strength": 0})
    assert given.image is not None
    wanted = Image.open("picture.jpg").resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(given.image), np.asarray(wanted))
    for wrong in ({"seed": -2}, {"use_compel": "2"}, {"num_inference_steps": 0}):
        with pytest.raises(InvalidRequest, match=next(iter(wrong))):
            model.generate(**{**small, **wrong})


def test_deepinfras_lora_by_name_and_scale() -> None:
    for name in ("lora", "lora_name"):
        made = GenerateRequest.from_kwargs(prompt="a", **{name: "style", "lora_scale": 0.6})
        assert made.loras == (("style", 0.6),)
    assert GenerateRequest.from_kwargs(prompt="a", lora="style").loras == (("style", 1.0),)
    assert GenerateRequest.from_kwargs(prompt="a", lora_scale=0.5).loras == ()
    with pytest.raises(InvalidRequest, match="lora_scale: is for one LoRA"):
        GenerateRequest.from_kwargs(prompt="a", loras=["style"], lora_scale=0.5)
    with pytest.raises(InvalidRequest, match="use_compel: comes with another"):
        GenerateRequest.from_kwargs(prompt="a", weighting="a1111", use_compel=True)


# -- 003: v1-5 on AzureML --------------------------------------------------------------------------

AZUREML = """
{
   "input_data": {
        "columns": ["prompt"],
        "data": ["a photograph of an astronaut riding a horse", "lion holding hunted deer in grass fields"],
        "index": [0, 1],
        "parameters": {
            "num_inference_steps": 50,
            "guidance_scale": 7.5
        }
    }
}
"""  # noqa: E501


def test_azuremls_sample(v1: Path) -> None:
    sent = json.loads(AZUREML)["input_data"]
    model = safelight.load(v1)
    assert isinstance(model, Generator)
    model.model.checker = rigged([0.1], [0.9])
    results = model.generate(sent["data"], **sent["parameters"])
    assert [result.request.prompt for result in results] == sent["data"]
    assert [result.nsfw for result in results] == [False, True]
    assert {(r.request.steps, r.request.guidance_scale) for r in results} == {(50, 7.5)}
    first, flagged = (np.asarray(result.image) for result in results)
    assert first.any()
    assert not flagged.any(), "totally black"


def test_azuremls_defaults_are_those_of_the_model(v1: Path) -> None:
    spec = safelight.load(v1).model.spec
    assert (spec.steps, spec.guidance_scale, spec.schedule.sampler) == (50, 7.5, "pndm")


# -- 004: small SD ---------------------------------------------------------------------------------

SMALL = """
import torch
from diffusers import StableDiffusionPipeline


model_id = "OFA-Sys/small-stable-diffusion-v0/"
pipe = StableDiffusionPipeline.from_pretrained(model_id, torch_dtype=torch.float16)
pipe = pipe.to("cuda")

prompt = "a apple, 4k"
image = pipe(prompt).images[0]  
    
image.save("apple.png")
"""


def test_small_sd(desk: Path) -> None:
    make_pipeline().save_pretrained("OFA-Sys/small-stable-diffusion-v0")
    names = lines(SMALL, {"from diffusers import": "from safelight.compat import", **CPU})
    assert Image.open(desk / "apple.png").size == (16, 16)
    assert names["pipe"].model.model.dtype == torch.float32
    assert names["pipe"](names["prompt"]).results[0].request.steps == 50
