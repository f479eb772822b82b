"""Every face against diffusers' pipeline of its name, at micro size, on the noise we draw."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from reference_pipelines import WIDTH, unclip_pipeline, variations_pipeline
from safelight import compat
from safelight.errors import InvalidRequest, VariantNotFound
from safelight.model import EMULATED
from safety_micro import processor, reference
from systems_micro import drawing, extra_noise, first_noise, make_pipeline, photo

PROMPT = "abc on top of xyz"
SHAPE = (1, 4, 16, 8)  # of latents; the micro autoencoder halves
SIZE: dict[str, Any] = {"width": 16, "height": 32}
RUN: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def saved(pipeline: Any, folder: Path) -> Path:
    quiet(pipeline).save_pretrained(folder)
    return folder


def same(ours: Any, theirs: Any) -> None:
    """Equal up to the half step of 8 bits."""
    ours, theirs = (np.stack([np.asarray(each) for each in images]) for images in (ours, theirs))
    ours = ours / 255 if ours.dtype == np.uint8 else ours
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 0.51 / 255


def far(ours: Any, theirs: Any) -> None:
    with pytest.raises(AssertionError):
        same(ours, theirs)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    pipeline = make_pipeline()
    return pipeline, saved(pipeline, tmp_path_factory.mktemp("faces") / "text")


@pytest.fixture(scope="module")
def variations(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    pipeline = variations_pipeline("pndm")
    return pipeline, saved(pipeline, tmp_path_factory.mktemp("faces") / "variations")


@pytest.fixture(scope="module")
def unclip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    pipeline = unclip_pipeline("ddim")
    return pipeline, saved(pipeline, tmp_path_factory.mktemp("faces") / "unclip")


# -- text to image ---------------------------------------------------------------------------------


def test_text_to_image(text: tuple[Any, Path]) -> None:
    peer, folder = text
    pipe = compat.StableDiffusionPipeline.from_pretrained(folder)
    given = {"prompt": PROMPT, "negative_prompt": "no", **RUN, **SIZE}
    theirs = peer(**given, generator=seeded(), output_type="np").images
    same(pipe(**given, generator=seeded()).images, theirs)
    same(pipe(**given, generator=seeded(), output_type="np").images, theirs)
    far(pipe(**given, generator=seeded(4)).images, theirs)


SWAPS: list[tuple[str, dict[str, Any]]] = [
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun", "euler_at_final": True}),
    ("EulerDiscreteScheduler", {}),
    ("DDIMScheduler", {}),
    ("UniPCMultistepScheduler", {"timestep_spacing": "linspace"}),
]


@pytest.mark.parametrize("spacing", [None, "trailing"])
def test_a_swapped_scheduler(text: tuple[Any, Path], tmp_path: Path, spacing: str | None) -> None:
    """Published files leave the spacing out, and then it is the new class's own."""
    _, folder = text
    mine = tmp_path / "mine"
    _copied(folder, mine, spacing)
    peer = quiet(diffusers.StableDiffusionPipeline.from_pretrained(mine))
    pipe = compat.StableDiffusionPipeline.from_pretrained(mine)
    given = {"prompt": PROMPT, **RUN, **SIZE}
    published, own = peer.scheduler.config, pipe.scheduler.config
    for name, changes in SWAPS:
        scheduler = getattr(diffusers, name).from_config(published, **changes)
        peer.scheduler = scheduler
        theirs = peer(**given, generator=seeded(), output_type="np").images
        pipe.scheduler = getattr(compat, name).from_config(own, **changes)
        same(pipe(**given, generator=seeded()).images, theirs)
        pipe.scheduler = scheduler
        same(pipe(**given, generator=seeded()).images, theirs)
    with pytest.raises(InvalidRequest, match="prediction_type: cannot be changed"):
        compat.DDIMScheduler.from_config(own, prediction_type="v_prediction")


def _copied(folder: Path, target: Path, spacing: str | None) -> None:
    """The folder with another spacing in its scheduler's file, or none."""
    target.mkdir()
    for part in folder.iterdir():
        (target / part.name).symlink_to(part)
    (target / "scheduler").unlink()
    (target / "scheduler").mkdir()
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    del config["timestep_spacing"]
    config |= {"clip_sample": False}  # as the published files have it
    config |= {} if spacing is None else {"timestep_spacing": spacing}
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


@torch.no_grad()
def parting(checker: Any, images: list[Image.Image]) -> None:
    """Move its thresholds so that its first concept alone parts these pictures in two."""
    pixels = processor()(images, return_tensors="pt").pixel_values
    seen = F.normalize(checker.visual_projection(checker.vision_model(pixels)[1]))
    near = (seen @ F.normalize(checker.concept_embeds)[0]).sort().values
    widest = int(near.diff().argmax())
    for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        weights.fill_(1.0)
    checker.concept_embeds_weights[0] = near[widest : widest + 2].mean()


def test_what_the_checker_flags_is_black_and_said(tmp_path: Path) -> None:
    peer, checker = quiet(make_pipeline()), reference()
    given = {"prompt": PROMPT, **RUN, **SIZE}
    made = [peer(**given, generator=seeded(seed)).images[0] for seed in range(6)]
    parting(checker, made)
    peer.register_modules(safety_checker=checker, feature_extractor=processor())
    pipe = compat.StableDiffusionPipeline.from_pretrained(saved(peer, tmp_path / "checked"))
    flags = []
    for seed in range(6):
        theirs = peer(**given, generator=seeded(seed), output_type="np")
        ours = pipe(**given, generator=seeded(seed))
        assert ours.nsfw_content_detected == theirs.nsfw_content_detected
        assert ours["nsfw_content_detected"] == ours[1]
        same(ours.images, theirs.images)
        flags += ours.nsfw_content_detected
    assert set(flags) == {True, False}
    pipe.safety_checker = None
    assert pipe(**given, generator=seeded()).nsfw_content_detected is None
    off = compat.StableDiffusionPipeline.from_pretrained(tmp_path / "checked", safety_checker=None)
    assert off(**given, generator=seeded()).nsfw_content_detected is None
    with pytest.raises(InvalidRequest, match="safety_checker: can only be None"):
        pipe.safety_checker = "mine"


def test_a_generator_used_again_goes_on(text: tuple[Any, Path]) -> None:
    pipe = compat.StableDiffusionPipeline.from_pretrained(text[1])
    shared = seeded(7)
    seeds = [pipe(PROMPT, **RUN, generator=shared).results[0].seed for _ in range(3)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    again = seeded(7)
    assert [pipe(PROMPT, **RUN, generator=again).results[0].seed for _ in range(3)] == seeds
    several = pipe([PROMPT, "z"], **RUN, generator=[seeded(5), seeded(9)])
    assert [result.seed for result in several.results] == [5, 9]
    counted = pipe([PROMPT, "z"], **RUN, generator=seeded(5), num_images_per_prompt=2)
    assert [result.seed for result in counted.results] == [5, 6, 7, 8]
    assert [result.request.prompt for result in counted.results] == [PROMPT, PROMPT, "z", "z"]
    assert pipe(PROMPT, **RUN, seed=11).results[0].seed == 11


# -- loading ---------------------------------------------------------------------------------------


def test_half_precision_on_a_cpu_runs_in_float32_and_says_so(
    text: tuple[Any, Path], caplog: pytest.LogCaptureFixture
) -> None:
    plain = compat.StableDiffusionPipeline.from_pretrained(text[1]).to("cpu")
    half = compat.StableDiffusionPipeline.from_pretrained(text[1], torch_dtype=torch.float16)
    half = half.to("cpu")
    with caplog.at_level(logging.WARNING, logger="safelight.compat"):
        a, b = (pipe(PROMPT, **RUN, generator=seeded()).images[0] for pipe in (plain, half))
    assert np.array_equal(np.asarray(a), np.asarray(b))
    assert [r.message for r in caplog.records if r.name.startswith("safelight.compat")] == [
        EMULATED
    ]


def test_a_device_that_is_not_there_is_named_at_first_use(
    text: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pipe = compat.StableDiffusionPipeline.from_pretrained(text[1]).to("cuda")
    with pytest.raises(InvalidRequest, match=r"device: cuda was asked for.*cpu") as caught:
        pipe(PROMPT)
    assert caught.value.field == "device"
    assert len(pipe.to("cpu")(PROMPT, **RUN).images) == 1


def bias(pipe: Any) -> torch.Tensor:
    return pipe.model.model.unet.conv_out.bias


def test_variants_and_the_cards_slip(text: tuple[Any, Path], tmp_path: Path) -> None:
    face = compat.StableDiffusionPipeline
    with pytest.raises(VariantNotFound, match="no variant 'fp16'"):
        face.from_pretrained(text[1], variant="fp16")(PROMPT)
    plain = face.from_pretrained(text[1], variation="fp16")
    assert len(plain(PROMPT, **RUN).images) == 1
    both, pipeline = tmp_path / "both", make_pipeline()
    pipeline.save_pretrained(both)
    marked = torch.full_like(pipeline.unet.conv_out.bias, 5.0)
    pipeline.unet.conv_out.bias.data.copy_(marked)
    pipeline.save_pretrained(both, variant="fp16")
    for spelled in ({"variant": "fp16"}, {"variation": "fp16"}, {"revision": "fp16"}):
        assert torch.equal(
            face.from_pretrained(both, **spelled).model.model.unet.conv_out.bias, marked
        )
    unmarked = face.from_pretrained(both).model.model.unet.conv_out.bias
    assert not torch.equal(unmarked, marked)


def test_the_scheduler_comes_with_the_model(text: tuple[Any, Path]) -> None:
    scheduler = compat.EulerDiscreteScheduler.from_pretrained(text[1], subfolder="scheduler")
    pipe = compat.StableDiffusionPipeline.from_pretrained(
        text[1], scheduler=scheduler, revision="main", use_safetensors=True
    )
    assert pipe(PROMPT, **RUN).results[0].request.sampler == "euler"


# -- from a picture --------------------------------------------------------------------------------


def test_image_to_image(text: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    parts, folder = text
    peer = quiet(diffusers.StableDiffusionImg2ImgPipeline(**parts.components))
    pipe = compat.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    image = photo(16, 32)
    given = {"prompt": PROMPT, "strength": 0.6, **RUN}
    with drawing(monkeypatch, extra_noise(3, "posterior", *SHAPE), first_noise(3, *SHAPE)):
        theirs = peer(image=image, **given, output_type="np").images
    same(pipe(image=image, **given, generator=seeded()).images, theirs)
    same(pipe(init_image=image, **given, generator=seeded()).images, theirs)
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)
    for tensor in (pixels, pixels[None], 2 * pixels - 1):
        same(pipe(image=tensor, **given, generator=seeded()).images, theirs)
    same(pipe(image=np.asarray(image)[None], **given, generator=seeded()).images, theirs)
    far(pipe(image=image.rotate(180), **given, generator=seeded()).images, theirs)
    assert pipe(image=photo(19, 37), **given).images[0].size == (16, 32)
    pairs = pipe(["a", "b"], [photo(16, 16), photo(24, 24)], **RUN, generator=seeded())
    assert [p.size for p in pairs.images] == [(16, 16), (24, 24)]
    assert [r.request.prompt for r in pairs.results] == ["a", "b"]
    with pytest.raises(InvalidRequest, match="image: is missing"):
        pipe(PROMPT)
    with pytest.raises(InvalidRequest, match="prompt: 2 for 3 in image"):
        pipe(["a", "b"], 3 * [image])
    with pytest.raises(InvalidRequest, match=r"image: no file .*none\.png"):
        pipe(PROMPT, "none.png")


def test_variations(variations: tuple[Any, Path]) -> None:
    peer, folder = variations
    pipe = compat.StableDiffusionImageVariationPipeline.from_pretrained(folder)
    image = photo(40, 24)
    theirs = peer(image, **SIZE, **RUN, generator=seeded(), output_type="np").images
    same(pipe(image, **SIZE, **RUN, generator=seeded()).images, theirs)
    four = pipe(2 * [image], num_images_per_prompt=2, **SIZE, **RUN, generator=seeded())
    assert [r.seed for r in four.results] == [3, 4, 5, 6]
    same(four.images[:1], theirs)


def prepared(image: Image.Image, side: int = 16) -> torch.Tensor:
    """The card's torchvision transforms, written out: ToTensor, Resize without antialiasing,
    Normalize."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    pixels = F.interpolate(pixels[None], (side, side), mode="bicubic", antialias=False)[0]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return (pixels - mean) / std


def test_variations_of_a_tensor_that_the_card_prepares(variations: tuple[Any, Path]) -> None:
    peer, folder = variations
    pipe = compat.StableDiffusionImageVariationPipeline.from_pretrained(folder, revision="v2.0")
    image = photo(40, 24)
    tensor = prepared(image)
    given = {**SIZE, **RUN}
    theirs = peer(tensor[None], **given, generator=seeded(), output_type="np").images
    same(pipe(tensor[None], **given, generator=seeded()).images, theirs)
    same(pipe(tensor, **given, generator=seeded()).images, theirs)  # as its page has it
    out = pipe(tensor, **given, generator=seeded())
    assert len(out.results[0].request.image_embedding or ()) == WIDTH
    seen = pipe(image, picture_fit="square", **given, generator=seeded())
    same(seen.images, theirs)
    far(pipe(image, **given, generator=seeded()).images, theirs)
    with pytest.raises(InvalidRequest, match=r"image: is a tensor of shape \(3, 20, 20\)"):
        pipe(prepared(image, 20))


def test_the_name_of_lambda_diffusers(variations: tuple[Any, Path]) -> None:
    face = compat.StableDiffusionImageEmbedPipeline.from_pretrained(variations[1])
    image = photo(40, 24)
    a = face(input_image=image, **RUN, generator=seeded())["sample"]
    b = face([image], **RUN, generator=seeded()).images
    assert np.array_equal(np.asarray(a[0]), np.asarray(b[0]))


def test_unclip(unclip: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    peer, folder = unclip
    pipe = compat.StableUnCLIPImg2ImgPipeline.from_pretrained(folder)
    image = photo(40, 24)
    given = {"prompt": PROMPT, "negative_prompt": "no", "noise_level": 300, **RUN, **SIZE}
    draws = extra_noise(3, "embedding", WIDTH)[None], first_noise(3, *SHAPE)
    with drawing(monkeypatch, *draws):
        theirs = peer(image, **given, output_type="np").images
    same(pipe(image, **given, generator=seeded()).images, theirs)
    with torch.no_grad():
        pixels = peer.feature_extractor(image, return_tensors="pt").pixel_values
        embeds = peer.image_encoder(pixels).image_embeds
    same(pipe(pixels, **given, generator=seeded()).images, theirs)
    same(pipe(image_embeds=embeds, **given, generator=seeded()).images, theirs)
    (images,) = pipe(image, **given, generator=seeded(), return_dict=False)
    same(images, theirs)
    far(pipe(image, **{**given, "noise_level": 200}, generator=seeded()).images, theirs)
    with drawing(monkeypatch, *draws):
        plain = peer(image, **RUN, **SIZE, output_type="np").images
    same(pipe(image, **RUN, **SIZE, generator=seeded()).images, plain)


def test_unclip_pairs_prompts_with_pictures(unclip: tuple[Any, Path]) -> None:
    pipe = compat.StableUnCLIPImg2ImgPipeline.from_pretrained(unclip[1])
    image = photo(40, 24)
    one = pipe(image, ["a", "b"], **RUN, generator=seeded())
    assert [r.request.prompt for r in one.results] == ["a", "b"]
    both = pipe([image, image.rotate(90)], ["a", "b"], **RUN, generator=seeded())
    assert np.array_equal(np.asarray(one.images[0]), np.asarray(both.images[0]))
    assert not np.array_equal(np.asarray(one.images[1]), np.asarray(both.images[1]))
    assert both.nsfw_content_detected is None
    for arguments, words in (
        ({"image": 3 * [image], "prompt": ["a", "b"]}, "prompt: 2 for 3 in image"),
        ({"image": image, "image_embeds": torch.ones(1, WIDTH)}, "image_embeds: comes with"),
        ({"image": None}, "image: is missing"),
        ({"image": image, "latents": first_noise(1, *SHAPE)}, "latents: is not an argument"),
        ({"image": image, "prompt": []}, "prompt: is an empty list"),
        ({"image": image, "count": 2}, "count: means the same"),
        ({"image_embeds": torch.ones(1, 5)}, "image_embedding: has 5 numbers"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            pipe(**arguments)
