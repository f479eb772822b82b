"""Before and after generation: what is removed, and that silence removes as well."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest
from PIL import Image

from micro_models import ToyUNet, toy_model
from safelight.errors import InvalidRequest
from safelight.generate import Generator, Preview
from safelight.safety import BATCH, ONLINE, Moderation
from safelight.verdict import CATEGORIES
from safety_micro import rigged

CALM = dict.fromkeys(CATEGORIES, 0)


class WordList:
    """A service's double: words with severities, and one answer for all pictures."""

    def __init__(self, picture: Mapping[str, Any] | None = None) -> None:
        self.words = {"fight": ("violence", 4), "scratch": ("violence", 2), "war": ("violence", 6)}
        self.answer = CALM if picture is None else picture
        self.prompts: list[str] = []
        self.pictures = 0

    def prompt(self, text: str) -> Mapping[str, int]:
        self.prompts.append(text)
        found = dict(CALM)
        for word, (category, severity) in self.words.items():
            if word in text:
                found[category] = max(found[category], severity)
        return found

    def picture(self, image: Image.Image) -> Mapping[str, Any]:
        self.pictures += 1
        return self.answer


def guarded(moderator: Any, **options: Any) -> Generator:
    return Generator(toy_model(), moderation=Moderation(moderator, **options))


def test_a_prompt_is_removed_with_its_reason_and_the_others_stay() -> None:
    service = WordList()
    generator = guarded(service)
    results = generator.generate(["a cube", "a fight", "a cone"], seed=1, steps=1)
    assert [r.outcome for r in results] == ["ok", "rejected", "ok"]
    assert results[1].image is None
    assert results[1].message == "the prompt was moderated: violence 4 (above 2)"
    (said,) = results[1].moderation
    assert (said.item, said.severity["violence"], said.removed) == ("prompt", 4, True)
    assert results[1].metadata["moderation"][0]["reason"] == results[1].message
    assert [m.item for m in results[0].moderation] == ["prompt", "picture"]
    unet = generator.model.unet
    assert isinstance(unet, ToyUNet)
    assert unet.calls == [4]  # two pictures, two branches each
    assert service.pictures == 2


@pytest.mark.parametrize(
    ("threshold", "prompt", "outcome"),
    [
        (ONLINE, "a scratch", "ok"),  # 2 is not above 2
        (BATCH, "a scratch", "rejected"),
        ({**dict.fromkeys(CATEGORIES, 7), "violence": 1}, "a scratch", "rejected"),
        (7, "a war", "ok"),
    ],
)
def test_thresholds(threshold: Any, prompt: str, outcome: str) -> None:
    (result,) = guarded(WordList(), threshold=threshold).generate(prompt, seed=1, steps=1)
    assert result.outcome == outcome


def test_a_prompt_is_asked_about_once_and_negative_prompts_never() -> None:
    service = WordList()
    generator = guarded(service)
    results = generator.generate("a cube", negative_prompt="a fight", seed=1, count=4, steps=1)
    assert [r.outcome for r in results] == ["ok"] * 4
    assert service.prompts == ["a cube"]
    assert service.pictures == 4


def test_a_picture_is_removed_with_its_reason() -> None:
    (result,) = guarded(WordList({**CALM, "sexual": 6})).generate("a cube", seed=1, steps=1)
    assert (result.outcome, result.image) == ("rejected", None)
    assert result.message == "the picture was moderated: sexual 6 (above 2)"
    assert [m.removed for m in result.moderation] == [False, True]


def test_prompts_or_pictures_alone() -> None:
    service = WordList({**CALM, "hate": 7})
    assert guarded(service, pictures=False).generate("a cube", seed=1, steps=1)[0].outcome == "ok"
    assert service.pictures == 0
    service = WordList()
    assert guarded(service, prompts=False).generate("a war", seed=1, steps=1)[0].outcome == "ok"
    assert service.prompts == []


# -- it fails closed ------------------------------------------------------------------------------


class Broken(WordList):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def prompt(self, text: str) -> Any:
        if isinstance(self.what, BaseException):
            raise self.what
        if callable(self.what):
            return self.what()
        return self.what


@pytest.mark.parametrize(
    "what",
    [
        OSError("the network is down"),
        KeyError("analysis"),
        None,
        {},
        {**CALM, "hate": 8},
        {**CALM, "hate": -1},
        {**CALM, "hate": 1.0},
        {**CALM, "hate": True},
        {**CALM, "hate": None},
        {k: v for k, v in CALM.items() if k != "hate"},
        {**CALM, "spam": 0},
        "hate",
    ],
)
def test_no_sense_removes(what: Any) -> None:
    generator = guarded(Broken(what))
    (result,) = generator.generate("a cube", seed=1, steps=1)
    assert (result.outcome, result.image) == ("rejected", None)
    assert result.message.startswith("the prompt could not be moderated: ")
    assert result.moderation[0].severity == {}
    assert generator.engine.calls == 0


def test_an_error_is_not_quoted(caplog: pytest.LogCaptureFixture) -> None:
    """Its text may hold the prompt, which is never logged."""
    generator = guarded(Broken(ValueError("cannot read 'my secret'")))
    (result,) = generator.generate("my secret", seed=1, steps=1)
    assert "secret" not in caplog.text + result.message


def test_no_answer_in_time_removes() -> None:
    never = threading.Event()
    generator = guarded(Broken(lambda: never.wait(30)), timeout=0.05)
    began = time.monotonic()
    (result,) = generator.generate("a cube", seed=1, steps=1)
    assert time.monotonic() - began < 10
    never.set()
    assert result.outcome == "rejected"
    assert "no answer within 0.05 seconds" in result.message


def test_a_picture_that_cannot_be_moderated_is_removed() -> None:
    (result,) = guarded(WordList({"nonsense": 1})).generate("a cube", seed=1, steps=1)
    assert (result.outcome, result.image) == ("rejected", None)


def test_nothing_of_a_moderated_picture_is_previewed() -> None:
    events = list(guarded(WordList()).stream("a cube", seed=1, steps=3, preview_every=1))
    assert not any(isinstance(event, Preview) for event in events)


def test_both_a_checker_and_a_moderator() -> None:
    model, service = toy_model(checker=rigged([0.5])), WordList()
    generator = Generator(model, moderation=Moderation(service))
    (black,) = generator.generate("a cube", seed=1, steps=1)
    assert (black.outcome, service.pictures) == ("nsfw", 0)  # nothing is left to be seen
    service.answer = {**CALM, "violence": 5}
    (blurred,) = generator.generate("a cube", seed=1, steps=1, safety="blur")
    assert (blurred.outcome, blurred.image, blurred.nsfw) == ("rejected", None, True)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"threshold": 8}, "threshold"),
        ({"threshold": -1}, "threshold"),
        ({"threshold": True}, "threshold"),
        ({"threshold": {"hate": 1}}, "threshold"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
    ],
)
def test_a_wrong_setting_is_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Moderation(WordList(), **options)
    assert caught.value.field == field
