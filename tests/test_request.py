"""Requests: every mistake is named before any model is loaded."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from safelight import fast, presets
from safelight.errors import InvalidRequest
from safelight.names import SAMPLERS
from safelight.request import ALIASES, MAX_SEED, GenerateRequest, ImageResult, Outcome
from safelight.spec import TinyDecoderSpec

WRONG: list[tuple[str, Any]] = [
    ("prompt", ""),
    ("prompt", " \n"),
    ("prompt", 3),
    ("prompt", None),
    ("prompt", b"a cube"),
    ("prompt", "a" * 20_001),
    ("prompt", "a \0 cube"),
    ("prompt", "half \ud800"),
    ("negative_prompt", 1),
    ("negative_prompt", None),
    ("steps", 0),
    ("steps", -1),
    ("steps", 1001),
    ("steps", 2.5),
    ("steps", True),
    ("steps", "25"),
    ("steps", math.nan),
    ("steps", math.inf),
    ("steps", [25]),
    ("guidance_scale", math.nan),
    ("guidance_scale", math.inf),
    ("guidance_scale", -1),
    ("guidance_scale", 1e9),
    ("guidance_scale", "7"),
    ("guidance_scale", False),
    ("guidance_rescale", 1.1),
    ("guidance_rescale", None),
    ("guidance_interval", 3),
    ("guidance_interval", (3,)),
    ("guidance_interval", (3, 1)),
    ("guidance_interval", (-1, 1)),
    ("guidance_interval", (0, math.nan)),
    ("guidance_interval", "01"),
    ("sampler", "no such"),
    ("sampler", 3),
    ("schedule", "no such"),
    ("schedule", 3),
    ("sampler_options", 3),
    ("eta", -0.1),
    ("eta", math.nan),
    ("width", 100_001),
    ("width", 63),
    ("width", 0),
    ("height", -8),
    ("height", "64"),
    ("height", 8200),
    ("seed", "x"),
    ("seed", -2),
    ("seed", 1.5),
    ("seed", MAX_SEED + 1),
    ("seed", True),
    ("count", 0),
    ("count", 1001),
    ("count", None),
    ("clip_skip", 12),
    ("weighting", "comfy"),
    ("weighting", None),
    ("deterministic", 1),
    ("deterministic", "yes"),
    ("preview_every", -1),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_value_names_its_field(field: str, value: Any) -> None:
    arguments = {"prompt": "a red cube", field: value}
    for make in (GenerateRequest, GenerateRequest.from_kwargs):
        with pytest.raises(InvalidRequest) as caught:
            make(**arguments)
        assert caught.value.field == field
        assert caught.value.problem
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_named_as_it_was_written(alias: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        GenerateRequest.from_kwargs(prompt="a red cube", **{alias: math.nan})
    assert caught.value.field == alias


@pytest.mark.parametrize(
    ("written", "field", "value"),
    [
        ({"num_inference_steps": 30}, "steps", 30),
        ({"cfg_scale": 7}, "guidance_scale", 7.0),
        ({"scale": np.float32(2)}, "guidance_scale", 2.0),
        ({"num_images_per_prompt": 4}, "count", 4),
        ({"batch_size": 2, "n_iter": 3}, "count", 6),
        ({"n_iter": 3, "batch_size": 2}, "count", 6),
        ({"sampler_name": "DPM++ 2M Karras"}, "sampler", "dpm++2m"),
        ({"sampler_name": "DPM++ 2M Karras"}, "schedule", "karras"),
        ({"sampler": "DPM++ 2M Karras", "schedule": "exponential"}, "schedule", "exponential"),
        ({"sampler": "DPM++ 2M SDE Heun"}, "sampler_options", {"variant": "heun"}),
        ({"scheduler": "EulerDiscreteScheduler"}, "sampler", "euler"),
        ({"scheduler": "Karras"}, "schedule", "karras"),
        ({"schedule": "Automatic"}, "schedule", None),
        ({"seed": -1}, "seed", None),
        ({"seed": np.int64(7)}, "seed", 7),
        ({"steps": 25.0}, "steps", 25),
        ({"guidance_interval": [0.5, 3]}, "guidance_interval", (0.5, 3.0)),
    ],
)
def test_other_programs_spellings(written: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(GenerateRequest.from_kwargs(prompt="a cone", **written), field) == value


@pytest.mark.parametrize(
    ("arguments", "named", "hint"),
    [
        ({"setps": 3}, "setps", "steps"),
        ({"guidence_scale": 3}, "guidence_scale", "guidance_scale"),
        ({"num_inference_step": 3}, "num_inference_step", "steps"),
        ({"xyzzy": 3}, "xyzzy", "Known: "),
        ({"scale": 1, "cfg_scale": 2}, "cfg_scale", "scale"),
        ({"n_iter": 2, "batch_size": "x"}, "batch_size", "whole number"),
        ({"n_iter": 2, "batch_size": 0}, "batch_size", "at least 1"),
        ({"eta": 0.5, "sampler": "pndm"}, "eta", "ddim"),
    ],
)
def test_a_wrong_name_gets_the_closest_one(
    arguments: dict[str, Any], named: str, hint: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        GenerateRequest.from_kwargs(prompt="a cone", **arguments)
    assert caught.value.field == named
    assert hint in str(caught.value)


def test_a_missing_prompt_and_an_unknown_field() -> None:
    with pytest.raises(InvalidRequest, match="prompt: is missing"):
        GenerateRequest.from_kwargs(steps=3)
    with pytest.raises(InvalidRequest, match="setps: is not a field"):
        GenerateRequest(prompt="a cone", setps=3)  # type: ignore[call-arg]


def test_a_request_never_changes_and_replace_checks_again() -> None:
    request = GenerateRequest(prompt="a cone")
    with pytest.raises(ValidationError):
        request.steps = 3  # type: ignore[misc]
    assert request.replace(steps=3).steps == 3
    with pytest.raises(InvalidRequest, match="steps"):
        request.replace(steps=0)


def test_resolved_makes_every_choice() -> None:
    request = GenerateRequest(prompt="a cone").resolved(presets.TINY)
    assert (request.steps, request.sampler) == (presets.TINY.steps, "dpm++2m")
    assert request.guidance_scale == presets.TINY.guidance_scale
    assert request.width == request.height == presets.TINY.native_size
    assert request.seed is not None
    assert 0 <= request.seed < 2**32
    assert request.resolved(presets.TINY) == request
    given_all = GenerateRequest(
        prompt="a cone", steps=3, guidance_scale=0, sampler="heun", width=8, height=16, seed=0
    )
    assert given_all.resolved(presets.SD_V1) == given_all
    assert GenerateRequest(prompt="a cone").resolved(presets.SD_V1).width == 512


def test_drawn_seeds_differ() -> None:
    drawn = {GenerateRequest(prompt="a cone").resolved(presets.TINY).seed for _ in range(20)}
    assert len(drawn) > 15


def test_eta_is_checked_against_the_cards_sampler() -> None:
    request = GenerateRequest(prompt="a cone", eta=0.5)
    with pytest.raises(InvalidRequest, match=r"eta: dpm\+\+2m"):
        request.resolved(presets.TINY)
    assert request.replace(sampler="ddim").resolved(presets.TINY).eta == 0.5


def test_picture_k_of_seed_s_is_picture_0_of_seed_s_plus_k() -> None:
    request = GenerateRequest(prompt="a cone", seed=7, count=3)
    assert request.picture(2) == request.replace(seed=9, count=1).picture(0)
    assert request.replace(seed=MAX_SEED).picture(1).seed == 0
    with pytest.raises(ValueError, match="resolved"):
        GenerateRequest(prompt="a cone").picture(0)


@given(
    prompt=st.text(min_size=1, max_size=40).filter(lambda t: t.strip() and "\0" not in t),
    steps=st.none() | st.integers(1, 1000),
    scale=st.none() | st.floats(0, 1000),
    sampler=st.none() | st.sampled_from([s.label for s in SAMPLERS]),
    seed=st.none() | st.integers(-1, MAX_SEED),
    interval=st.none() | st.tuples(st.floats(0, 1), st.floats(2, 99)),
)
def test_canonical_json_round_trips(
    prompt: str, steps: Any, scale: Any, sampler: Any, seed: Any, interval: Any
) -> None:
    request = GenerateRequest(
        prompt=prompt,
        steps=steps,
        guidance_scale=scale,
        sampler=sampler,
        seed=seed,
        guidance_interval=interval,
    )
    again = GenerateRequest.from_json(request.canonical())
    assert again == request
    assert again.canonical() == request.canonical()
    assert again.digest == request.digest
    assert list(json.loads(request.canonical())) == sorted(json.loads(request.canonical()))


def test_the_digest_tells_requests_apart_and_stays() -> None:
    a = GenerateRequest(prompt="a cone")
    assert a.digest != a.replace(steps=3).digest
    assert a.replace(guidance_scale=5).digest == a.replace(guidance_scale=5.0).digest
    # Pinned: pictures that exist carry this JSON.
    assert a.replace(seed=7).canonical() == (
        '{"clip_skip":null,"count":1,"deterministic":false,"eta":null,"guidance_interval":null,'
        '"guidance_rescale":0.0,"guidance_scale":null,"height":null,"negative_prompt":"",'
        '"preview_every":0,"prompt":"a cone","sampler":null,"sampler_options":{},"schedule":null,'
        '"schema":1,"seed":7,"steps":null,"weighting":"none","width":null}'
    )
    said = json.loads(a.replace(safety="blur", loras=("x",)).canonical())
    assert {*said} == {*json.loads(a.canonical()), "safety", "loras"}
    assert GenerateRequest.from_json(said).safety == "blur"


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{", "request"),
        ("[]", "request"),
        ('{"prompt": "a cone"}', "schema"),
        ('{"schema": 99, "prompt": "a cone"}', "schema"),
        ('{"schema": 1, "prompt": "a cone", "steps": 0}', "steps"),
        ('{"schema": 1, "prompt": "a cone", "stepz": 1}', "stepz"),
        ('{"schema": 1}', "prompt"),
    ],
)
def test_wrong_json_is_named(text: str, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        GenerateRequest.from_json(text)
    assert caught.value.field == field


def test_results_are_replaced_not_changed() -> None:
    result = ImageResult(None, 7, Outcome.nan, GenerateRequest(prompt="a cone", seed=7))
    assert result.replace(outcome=Outcome.cancelled).outcome == "cancelled"
    assert result.outcome == "nan"


def test_requests_need_no_torch() -> None:
    code = (
        "import sys; from safelight.request import GenerateRequest; GenerateRequest(prompt='a');"
        "print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- fast modes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"fast": 4}, "fast"),
        ({"fast": "2x"}, "fast"),
        ({"guidance_until": 1.5}, "guidance_until"),
        ({"freeze_context": True}, "freeze_context"),
        ({"block_cache": 0}, "block_cache"),
        ({"block_cache_branch": 1}, "block_cache_branch"),
        ({"block_cache_spacing": "uniform"}, "block_cache_spacing"),
        ({"block_cache": 2, "block_cache_spacing": "cubic"}, "block_cache_spacing"),
        ({"decoder": "small"}, "decoder"),
    ],
)
def test_a_wrong_lever_is_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        GenerateRequest(prompt="x", **fields)
    assert caught.value.field == field


def test_presets_become_the_levers_they_stand_for() -> None:
    for strength, table in fast.PRESETS.items():
        found = GenerateRequest(prompt="x", fast=strength).resolved(presets.SD_V1)
        expected = {k: v for k, v in table.items() if k != "decoder"}  # sd-v1 has no tiny one
        assert {name: getattr(found, name) for name in expected} == expected
        assert found.fast is None
        assert found.decoder is None
        text = found.canonical()
        assert '"fast"' not in text
        assert GenerateRequest.from_json(text) == found


def test_what_was_given_stays_beside_a_preset() -> None:
    given = {"steps": 33, "sampler": "ddim", "guidance_until": 1.0, "block_cache": 1}
    found = GenerateRequest(prompt="x", fast=3, **given).resolved(presets.SD_V1)
    assert {name: getattr(found, name) for name in given} == given
    assert found.schedule is None, "the preset's steps are placed for its own sampler"


def test_a_student_keeps_its_own_steps() -> None:
    student = presets.SD_V1.replace(
        steps=4,
        unet=presets.SD_V1.unet.replace(guidance_embedding_size=64),
        tiny_decoder=TinyDecoderSpec(),
    )
    found = GenerateRequest(prompt="x", fast=3).resolved(student)
    assert (found.steps, found.guidance_until, found.block_cache) == (4, None, None)
    assert found.decoder == "tiny"
