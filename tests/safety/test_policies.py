"""What generation does about a verdict: policies, previews, records, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from micro_models import MICRO, ToyVAE, toy_model
from safelight import provenance
from safelight.checker import NO_CHECKER, Checker
from safelight.errors import InvalidRequest
from safelight.generate import Generator, Preview
from safelight.generate.guard import blurred
from safelight.model import Model
from safelight.request import GenerateRequest, ImageResult
from safelight.store.folder import write_folder
from safety_micro import reference, rigged, save_reference

CUBE = "a red cube"
BAD, GOOD = [0.5, 0.0], [0.0, 0.0]


def generator(*rows: list[float]) -> Generator:
    return Generator(toy_model(checker=rigged(*rows)))


def make(generator: Generator, **arguments: Any) -> ImageResult:
    (result,) = generator.generate(CUBE, seed=7, steps=2, **arguments)
    return result


def plain() -> np.ndarray:
    image = make(Generator(toy_model())).image
    assert image is not None
    return np.asarray(image)


@pytest.mark.parametrize(
    ("safety", "outcome", "action"),
    [
        (None, "nsfw", "blackened"),  # the cards'
        ("black", "nsfw", "blackened"),
        ("flag", "nsfw", "none"),
        ("blur", "nsfw", "blurred"),
        ("reject", "rejected", "removed"),
    ],
)
def test_what_is_done_about_a_flagged_picture(safety: Any, outcome: str, action: str) -> None:
    result = make(generator(BAD), safety=safety)
    assert (result.outcome, result.nsfw) == (outcome, True)
    assert result.safety is not None
    assert (result.safety.policy, result.safety.action) == (safety or "black", action)
    assert "thing 0" in result.message
    assert result.safety.scores[0].score == pytest.approx(0.3)
    assert result.safety.scores[0].threshold == pytest.approx(0.2)
    if action == "removed":
        assert result.image is None
        return
    assert result.image is not None
    pixels = np.asarray(result.image)
    assert bool((pixels == 0).all()) == (action == "blackened")
    assert np.array_equal(pixels, plain()) == (action == "none")
    assert result.metadata["pixels"] == provenance.pixel_digest(result.image)


@pytest.mark.parametrize("safety", [None, "black", "flag", "blur", "reject"])
def test_a_safe_picture_is_left_alone(safety: Any) -> None:
    result = make(generator(GOOD), safety=safety)
    assert (result.outcome, result.nsfw, result.message) == ("ok", False, "")
    assert np.array_equal(np.asarray(result.image), plain())
    assert result.safety is not None
    assert result.safety.action == "none"


def test_off_is_said_and_nobody_looks() -> None:
    bad = generator(BAD)
    result = make(bad, safety="off")
    assert (result.outcome, result.nsfw) == ("ok", None)
    assert result.metadata["safety"]["policy"] == "off"
    assert result.metadata["safety"]["nsfw"] is None
    assert bad.model.checker is not None
    assert bad.model.checker.head.asked == 0  # type: ignore[attr-defined]
    without = make(Generator(toy_model()), safety="off")
    assert without.metadata["safety"]["policy"] == "off"


def test_no_checker_is_null_never_false() -> None:
    result = make(Generator(toy_model()))
    assert result.safety is None
    assert result.nsfw is None
    assert result.metadata["safety"] is None
    assert json.loads(json.dumps(result.metadata))["safety"] is None


@pytest.mark.parametrize("safety", ["flag", "blur", "black", "reject"])
def test_a_policy_that_cannot_be_kept_is_refused(safety: str) -> None:
    without = Generator(toy_model())
    with pytest.raises(InvalidRequest, match="needs a safety checker") as caught:
        without.stream(CUBE, safety=safety)
    assert caught.value.field == "safety"
    with pytest.raises(InvalidRequest):
        GenerateRequest(prompt=CUBE, safety="maybe")


def test_each_picture_has_a_verdict_of_its_own() -> None:
    results = generator(GOOD, BAD, GOOD).generate(CUBE, seed=1, count=3, steps=1)
    assert [r.nsfw for r in results] == [False, True, False]
    assert [r.outcome for r in results] == ["ok", "nsfw", "ok"]


def test_scores_that_are_no_numbers_are_flagged() -> None:
    result = make(generator([float("nan"), 0.0]))
    assert (result.outcome, result.nsfw) == ("nsfw", True)
    assert "not numbers" in result.message
    assert result.metadata["safety"]["scores"][0]["score"] is None


def test_a_checker_that_fails_lets_nothing_through() -> None:
    bad = generator(GOOD)

    def fail(_: object) -> None:
        raise RuntimeError("lost the concepts")

    assert bad.model.checker is not None
    bad.model.checker.head.cosines = fail  # type: ignore[method-assign,assignment]
    result = make(bad)
    assert (result.outcome, result.image, result.nsfw) == ("error", None, None)


def test_a_picture_that_is_none_was_not_looked_at() -> None:
    bad = generator(GOOD)
    vae = bad.model.vae
    assert isinstance(vae, ToyVAE)
    vae.poison = lambda pixels: pixels * float("nan")
    result = make(bad)
    assert (result.outcome, result.nsfw) == ("nan", None)
    assert result.metadata["safety"]["policy"] == "black"


def test_a_recovered_picture_is_looked_at_too() -> None:
    bad = Generator(toy_model(checker=rigged(BAD), dtype=torch.bfloat16))
    vae = bad.model.vae
    assert isinstance(vae, ToyVAE)
    vae.poison = lambda p: p if p.dtype == torch.float32 else p * float("inf")
    result = make(bad, safety="flag")
    assert result.outcome == "nsfw"
    assert "again in float32" in result.message
    assert "flagged" in result.message


@pytest.mark.parametrize("safety", ["black", "blur", "reject", "flag", "off"])
def test_previews_are_looked_at_too(safety: str) -> None:
    bad = generator(BAD)
    events = bad.stream(CUBE, seed=7, steps=3, sampler="euler", preview_every=1, safety=safety)
    previews = [np.asarray(e.image) for e in events if isinstance(e, Preview)]
    bare = Generator(toy_model()).stream(CUBE, seed=7, steps=3, sampler="euler", preview_every=1)
    wanted = [np.asarray(e.image) for e in bare if isinstance(e, Preview)]
    if safety == "reject":
        assert previews == []
        return
    assert len(previews) == 2
    for seen, made in zip(previews, wanted, strict=True):
        assert np.array_equal(seen, made) == (safety in ("flag", "off"))
        assert (seen == 0).all() == (safety == "black")


def test_a_blur_keeps_no_shapes() -> None:
    """Two pictures that differ in detail alone are the same when blurred."""
    rng = np.random.default_rng(0)
    base = np.full((64, 64, 3), 128, np.int16)
    detail = np.zeros_like(base)
    detail[::2, ::2] += 40
    detail[1::2, 1::2] -= 40
    checker = np.asarray(blurred(Image.fromarray((base + detail).astype(np.uint8))), np.int16)
    assert np.abs(checker - 128).max() <= 1
    noise = Image.fromarray(rng.integers(0, 255, (48, 96, 3), np.uint8))
    assert blurred(noise).size == (96, 48)
    assert np.asarray(blurred(noise)).std() < np.asarray(noise).std() / 4


# -- on disk -------------------------------------------------------------------------------------


def test_the_file_carries_scores_and_thresholds(tmp_path: Path) -> None:
    result = make(generator(BAD), safety="blur")
    provenance.save(result, tmp_path / "a.png")
    safety = provenance.read(tmp_path / "a.png").record["safety"]
    assert safety["nsfw"] is True
    assert safety["scores"][0] == {
        "name": "thing 0",
        "score": 0.3,
        "threshold": 0.2,
        "special": False,
    }


def test_a_flagged_picture_is_replayed_and_another_checker_is_told(tmp_path: Path) -> None:
    bad = generator(BAD)
    provenance.save(make(bad), tmp_path / "a.png")
    again = bad.replay(tmp_path / "a.png")
    assert (again.same_plan, again.same_pixels) == (True, True)
    without = Generator(toy_model()).replay(tmp_path / "a.png")
    assert (without.same_plan, without.broken) == (False, False)
    assert any(change.startswith("plan checker: ") for change in without.changes)


# -- loading -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from micro_models import micro_model

    model = micro_model()
    folder = tmp_path_factory.mktemp("plain")
    states = {name: net.state_dict() for name, net in model.networks.items()}
    write_folder(folder, MICRO, states, model.tokenizer)
    return folder


def with_checker(plain_folder: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(plain_folder, target)
    save_reference(reference(), target)
    index = json.loads((target / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (target / "model_index.json").write_text(json.dumps(index))
    return target


def test_a_models_own_checker_is_on(plain_folder: Path, tmp_path: Path) -> None:
    model = Model.load(with_checker(plain_folder, tmp_path / "m"), device="cpu")
    assert model.checker is not None
    assert NO_CHECKER not in model.notes
    result = make(Generator(model), guidance_scale=1)
    assert result.nsfw is not None
    assert result.safety is not None
    assert len(result.safety.scores) == 20


def test_null_in_the_index_means_absent(plain_folder: Path, tmp_path: Path) -> None:
    target = with_checker(plain_folder, tmp_path / "m")
    index = json.loads((target / "model_index.json").read_text())
    index["safety_checker"] = [None, None]
    (target / "model_index.json").write_text(json.dumps(index))
    model = Model.load(target, device="cpu")
    assert model.checker is None
    assert model.notes.count(NO_CHECKER) == 1


def test_a_checker_is_attached_to_any_model(plain_folder: Path, tmp_path: Path) -> None:
    assert Model.load(plain_folder, device="cpu").notes.count(NO_CHECKER) == 1
    place = save_reference(reference(1), tmp_path)
    model = Model.load(plain_folder, device="cpu", safety_checker=place)
    assert model.checker is not None
    assert model.checker.digest == Checker.load(place).digest
    assert NO_CHECKER not in model.notes
    other = save_reference(reference(2), tmp_path / "other")
    own = with_checker(plain_folder, tmp_path / "m")
    replaced = Model.load(own, device="cpu", safety_checker=other)
    assert replaced.checker is not None
    assert replaced.checker.digest == Checker.load(other).digest


def test_an_exported_model_keeps_its_checker(plain_folder: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from safelight.cli.models import write

    model = Model.load(with_checker(plain_folder, tmp_path / "m"), device="cpu")
    write(model, tmp_path / "out")
    again = Model.load(tmp_path / "out", device="cpu")
    assert model.checker is not None
    assert again.checker is not None
    assert again.checker.digest == model.checker.digest
    assert again.checker.spec.pictures == model.checker.spec.pictures
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(
        pipe.safety_checker.concept_embeds_weights, model.checker.head.concept_embeds_weights
    )
