"""What a picture says about how it was made, and making it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from micro_models import MICRO, ToyUNet, toy_model
from safelight import provenance
from safelight.errors import InvalidRequest
from safelight.generate import Generator
from safelight.names import SAMPLERS
from safelight.request import GenerateRequest, ImageResult
from safelight.store import pictures

CUBE = "a red cube on top of a blue sphere"
ENDINGS = [".png", ".jpg", ".webp"]


@pytest.fixture
def toy() -> Generator:
    return Generator(toy_model())


def make(toy: Generator, **arguments: Any) -> ImageResult:
    return toy.generate(**{"prompt": CUBE, "seed": 7, "steps": 2, **arguments})[0]


# -- A1111's text ---------------------------------------------------------------------------------


def test_the_text_has_a1111s_keys_in_its_order(toy: Generator) -> None:
    toy.model.digest = "0123456789abcdef"
    result = make(
        toy,
        negative_prompt="a cone",
        sampler="DPM++ 2M Karras",
        guidance_scale=7,
        clip_skip=1,
        width=48,
    )
    assert provenance.parameters_text(result.metadata).split("\n") == [
        CUBE,
        "Negative prompt: a cone",
        "Steps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 7, Size: 48x32, "
        "Model hash: 0123456789, Model: micro, Clip skip: 2, RNG: CPU, Version: safelight 0.1.0",
    ]


def test_values_with_commas_are_quoted(toy: Generator) -> None:
    toy.model.spec = toy.model.spec.replace(name='tiny, "v2": best')
    text = provenance.parameters_text(make(toy).metadata)
    assert 'Model: "tiny, \\"v2\\": best"' in text
    assert provenance.parse_parameters(text)[2]["Model"] == 'tiny, "v2": best'


TOY = toy_model()
words = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=30)
lines = words.map(str.strip).filter(lambda t: t and "Negative prompt:" not in t)


@given(
    prompt=lines,
    negative=st.just("") | lines,
    sampler=st.sampled_from([s.name for s in SAMPLERS]),
    seed=st.integers(0, 2**63 - 1),
    scale=st.floats(0, 99).map(lambda v: round(v, 3)),
)
def test_the_text_is_read_back(
    prompt: str, negative: str, sampler: str, seed: int, scale: float
) -> None:
    request = GenerateRequest(
        prompt=prompt, negative_prompt=negative, sampler=sampler, seed=seed, guidance_scale=scale
    ).resolved(MICRO)
    record = provenance.metadata(TOY, request, None, outcome="ok")
    found = provenance.from_parameters(provenance.parameters_text(record)).request
    lost = {"weighting": "none"}  # the text is in A1111's dialect
    assert found.replace(**lost) == request


def test_other_programs_pictures_are_understood(tmp_path: Path) -> None:
    text = (
        "a castle, (tall:1.2)\nwith two towers\nNegative prompt: blurry,\nugly\n"
        "Steps: 28, Sampler: Euler a, Schedule type: Automatic, CFG scale: 6.5, Seed: 99, "
        'Size: 512x768, Model hash: abc, Model: dream, Denoising strength: 0.5, Lora hashes: "a: b"'
    )
    path = tmp_path / "castle.png"
    pictures.save(path, Image.new("RGB", (8, 8)), text)
    found = provenance.read(path)
    assert found.request == GenerateRequest(
        prompt="a castle, (tall:1.2)\nwith two towers",
        negative_prompt="blurry,\nugly",
        steps=28,
        sampler="euler-a",
        guidance_scale=6.5,
        seed=99,
        width=512,
        height=768,
        weighting="a1111",
    )
    assert found.model is None
    assert "Denoising strength: 0.5 is not taken over" in found.notes
    assert any("GPU" in note for note in found.notes)


def test_text_of_a_prompt_alone() -> None:
    assert provenance.from_parameters("a cone").request.prompt == "a cone"
    with pytest.raises(InvalidRequest, match="seed"):
        provenance.from_parameters("a cone\nSteps: 3, Sampler: Euler, CFG scale: 2, Seed: x")


# -- our JSON -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_says_all_of_it(toy: Generator, tmp_path: Path, ending: str) -> None:
    result = make(toy, prompt="a röd cube, 红", negative_prompt="e\nf")
    path = provenance.save(result, tmp_path / f"a{ending}")
    found = provenance.read(path)
    assert found.request == result.request
    assert found.record == result.metadata
    assert found.parameters == provenance.parameters_text(result.metadata)


def test_equal_pictures_have_equal_files(toy: Generator, tmp_path: Path) -> None:
    a, b = (provenance.save(make(toy), tmp_path / f"{k}.png").read_bytes() for k in "ab")
    assert a == b


def test_the_files_schema_stays() -> None:
    request = GenerateRequest(prompt=CUBE, seed=7).resolved(MICRO)
    record = provenance.metadata(toy_model(), request, None, outcome="nan", message="x")
    assert list(record) == [
        "schema",
        "kind",
        "safelight",
        "request",
        "model",
        "plan",
        "plan_digest",
        "batch",
        "pixels",
        "outcome",
        "message",
        "notices",
        "safety",
        "moderation",
    ]
    assert set(record["plan"]) == {
        "batch",
        "chip",
        "device",
        "dtype",
        "kernels",
        "numerics",
        "threads",
        "torch",
    }
    assert record["plan_digest"] == provenance.digest(record["plan"])


def test_no_folders_of_the_person_who_made_it(toy: Generator, tmp_path: Path) -> None:
    toy.model.source = str(tmp_path / "secret" / "my-model")
    assert str(tmp_path) not in json.dumps(make(toy).metadata)
    assert make(toy).metadata["model"]["source"] == "my-model"
    toy.model.source = "/home/x/hub/models--org--name/snapshots/0abc"
    assert make(toy).metadata["model"]["source"] == "org/name@0abc"


@pytest.mark.parametrize(
    ("text", "record", "problem"),
    [
        ("", "", "does not say"),
        ("", "{broken", "does not say"),
        ("", '{"kind": "other"}', "does not say"),
        ("", '{"kind": "safelight.picture", "schema": 99}', "schema 99"),
    ],
)
def test_a_file_that_cannot_be_replayed_says_why(
    tmp_path: Path, text: str, record: str, problem: str
) -> None:
    path = tmp_path / "a.png"
    pictures.save(path, Image.new("RGB", (8, 8)), text, record)
    with pytest.raises(InvalidRequest, match=problem) as caught:
        provenance.read(path)
    assert caught.value.field == "picture"


def test_no_file_and_no_picture(toy: Generator, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no file"):
        provenance.read(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(InvalidRequest, match="not a picture"):
        provenance.read(tmp_path / "text.png")
    with pytest.raises(InvalidRequest, match="no picture"):
        provenance.save(make(toy).replace(image=None, outcome="nan"), tmp_path / "a.png")


# -- again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_replay_is_the_same_picture(toy: Generator, tmp_path: Path, ending: str) -> None:
    results = toy.generate(CUBE, seed=7, count=3, steps=3, sampler="euler-a")
    for result in results:  # each in the company it was made in
        path = provenance.save(result, tmp_path / f"{result.seed}{ending}")
        replayed = Generator(toy.model).replay(path)
        assert replayed.same_plan
        assert replayed.same_pixels
        assert not replayed.broken
        assert replayed.changes == ()
        assert replayed.lossy == (ending != ".png")
        assert replayed.difference is not None
        if ending == ".png":
            assert replayed.difference == provenance.Difference(0, 0.0, 1.0)


def test_a_replay_says_what_has_changed(toy: Generator, tmp_path: Path) -> None:
    result = make(toy)
    record = {**result.metadata, "plan": {**result.metadata["plan"], "torch": "1.0", "threads": 9}}
    record["plan_digest"] = provenance.digest(record["plan"])
    path = provenance.save(result.replace(metadata=record), tmp_path / "a.png")
    replayed = toy.replay(path)
    assert not replayed.same_plan
    assert replayed.same_pixels
    assert [change.split(":")[0] for change in replayed.changes] == ["plan threads", "plan torch"]


def test_another_model_and_a_broken_promise_are_told_apart(toy: Generator, tmp_path: Path) -> None:
    toy.model.digest = "a" * 64
    path = provenance.save(make(toy), tmp_path / "a.png")
    other = toy_model()
    unet = other.unet
    assert isinstance(unet, ToyUNet)
    unet.poison = lambda answer: answer * 1.1
    other.digest = "a" * 64
    replayed = Generator(other).replay(path)
    assert replayed.broken
    assert replayed.difference is not None
    assert replayed.difference.largest > 0
    other.digest = "b" * 64
    replayed = Generator(other).replay(path)
    assert not replayed.broken
    assert replayed.changes == (f"model digest: {'a' * 10}…, now {'b' * 10}…",)


def test_pictures_made_among_strangers_are_replayed_alone(toy: Generator, tmp_path: Path) -> None:
    result = toy.generate(["a cone", CUBE], seed=7, steps=2)[1]
    replayed = toy.replay(provenance.save(result, tmp_path / "a.png"))
    assert not replayed.same_plan
    assert "it was made together with other requests' pictures" in replayed.changes
    assert replayed.difference is not None
    assert replayed.difference.largest <= 1


def test_a_resized_picture_is_refused(toy: Generator, tmp_path: Path) -> None:
    result = make(toy)
    assert result.image is not None
    path = provenance.save(result.replace(image=result.image.resize((16, 16))), tmp_path / "a.png")
    with pytest.raises(InvalidRequest, match="resized"):
        toy.replay(path)


def test_difference() -> None:
    a, b = Image.new("RGB", (2, 1), (0, 0, 0)), Image.new("RGB", (2, 1), (0, 0, 0))
    b.putpixel((0, 0), (0, 3, 0))
    assert provenance.compare(a, b) == provenance.Difference(3, 0.5, 5 / 6)
