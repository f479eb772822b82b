"""Fast modes from end to end: recorded, replayed, refused by name, and nobody else's business."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from micro_models import MICRO, micro_model, toy_model
from safelight import fast, shipped
from safelight.errors import InvalidRequest, WeightsError
from safelight.generate import Generator, Preview
from safelight.nets.tiny_decoder import TinyDecoder
from safelight.nets.vae import to_uint8
from safelight.provenance import save
from safelight.request import GenerateRequest
from safelight.spec import TinyDecoderSpec

SPEC = TinyDecoderSpec(channels=(8, 8, 8, 8), blocks=(1, 1, 1, 1))
WORDS = "a red cube"


@pytest.fixture(scope="module")
def generator() -> Generator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tiny = TinyDecoder(SPEC)
    return Generator(micro_model(tiny_decoder=tiny))


LEVERS: list[dict[str, Any]] = [
    {"guidance_until": 0.5},
    {"guidance_until": 0.5, "freeze_context": True},
    {"guidance_interval": (0.5, 5.0)},
    {"block_cache": 2},
    {"block_cache": 3, "block_cache_branch": 2, "block_cache_spacing": "quadratic"},
    {"decoder": "tiny"},
    {"schedule": "ays", "sampler": "unipc", "steps": 7},
    {"fast": 1},
    {"fast": 2},
    {"fast": 3},
]


def one(generator: Generator, **fields: Any) -> Any:
    (result,) = generator.generate(WORDS, seed=5, **{"steps": 6, **fields})
    return result


@pytest.mark.parametrize("fields", LEVERS, ids=str)
def test_a_lever_is_recorded_and_replayed(
    generator: Generator, fields: dict[str, Any], tmp_path: Path
) -> None:
    result = one(generator, **fields)
    told = result.metadata["request"]
    wanted = dict(fields)
    if strength := wanted.pop("fast", None):
        wanted = {k: v for k, v in fast.PRESETS[strength].items() if k != "steps"}
        assert "fast" not in told
    for name, value in wanted.items():
        assert told[name] == (list(value) if isinstance(value, tuple) else value)
    replayed = generator.replay(save(result, tmp_path / "one.png"))
    assert replayed.same_pixels
    changed = np.asarray(result.image, int) - np.asarray(one(generator).image, int)
    assert np.abs(changed).max() > 0, "it did nothing"


def test_levers_in_one_call_are_what_they_are_alone(generator: Generator) -> None:
    requests = [
        GenerateRequest(prompt=WORDS, seed=5, **{"steps": 6, **fields}) for fields in [{}, *LEVERS]
    ]
    together = generator.generate(request=requests)
    for request, result in zip(requests, together, strict=True):
        (alone,) = generator.generate(request=request)
        apart = np.asarray(alone.image, int) - np.asarray(result.image, int)
        assert np.abs(apart).max() <= 1


@pytest.mark.parametrize(
    "fields", [{"guidance_until": 1.0}, {"block_cache": 1}, {"decoder": "full"}, {"fast": 0}]
)
def test_a_lever_that_is_off_is_exact(generator: Generator, fields: dict[str, Any]) -> None:
    exact, same = one(generator), one(generator, **fields)
    assert np.array_equal(np.asarray(exact.image), np.asarray(same.image))


def test_the_tiny_decoder_makes_the_picture_and_the_previews(generator: Generator) -> None:
    seen: list[torch.Tensor] = []
    net = generator.model.tiny_decoder
    assert net is not None
    events = list(
        generator.stream(WORDS, seed=5, steps=4, sampler="ddim", decoder="tiny", preview_every=3)
    )
    (preview,) = [event for event in events if isinstance(event, Preview)]
    result: Any = events[-1]
    sketch = generator.model.runtime.sketch

    def listen(latents: torch.Tensor) -> torch.Tensor:
        seen.append(latents.clone())
        return sketch(latents)

    generator.model.runtime.sketch = listen  # type: ignore[method-assign]
    try:
        again = one(generator, steps=4, sampler="ddim", decoder="tiny")
        one(generator, steps=4, sampler="ddim", preview_every=3)
        one(generator, steps=4, sampler="ddim", preview_every=3, decoder="full")
    finally:
        generator.model.runtime.sketch = sketch  # type: ignore[method-assign]
    assert len(seen) == 2, "one picture, and one preview where nothing was said"
    with torch.inference_mode():
        expected = to_uint8(net(seen[0]))[0].numpy().astype(int)
    assert np.abs(expected - np.asarray(again.image, int)).max() <= 1
    assert np.array_equal(np.asarray(again.image), np.asarray(result.image))
    assert preview.image.size == result.image.size


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"decoder": "tiny"}, "decoder"),
        ({"block_cache": 2, "block_cache_branch": 4}, "block_cache_branch"),
    ],
)
def test_what_a_model_cannot_is_refused_by_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Generator(micro_model()).stream(WORDS, **fields)
    assert caught.value.field == field


def test_other_networks_refuse_too() -> None:
    student = MICRO.replace(unet=MICRO.unet.replace(guidance_embedding_size=8))
    with pytest.raises(InvalidRequest, match="guidance built in"):
        Generator(micro_model(student)).stream(WORDS, guidance_until=0.5)
    with pytest.raises(InvalidRequest, match="another kind"):
        Generator(toy_model()).stream(WORDS, block_cache=2)
    with pytest.raises(InvalidRequest, match="laid out"):
        Generator(toy_model(unet=micro_model().unet)).stream(
            WORDS, guidance_until=0.5, freeze_context=True
        )


def test_a_student_is_found_by_its_teachers_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from safelight.cli.fast import model_for

    card = json.loads((shipped.FAMILY / "tiny-v" / "model.json").read_text())
    card["spec"]["student"] = "quick"
    (tmp_path / "tiny-v").mkdir()
    (tmp_path / "tiny-v" / "model.json").write_text(json.dumps(card))
    monkeypatch.setattr(shipped, "FAMILY", tmp_path)
    assert model_for("tiny-v", 2) == "tiny-v"
    with pytest.raises(WeightsError, match="student of tiny-v"):
        model_for("tiny-v", 3)
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "model.json").write_text("{}")
    assert model_for("tiny-v", 3) == "quick"
    assert model_for("somebody/else", 3) == "somebody/else"
