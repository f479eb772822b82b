"""The client of Azure AI Content Safety against a server that answers as it is documented."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from PIL import Image

from content_safety_double import KEY, Service, content_safety
from micro_models import toy_model
from safelight.errors import InvalidRequest
from safelight.generate import Generator
from safelight.safety import BATCH, ONLINE, Moderation
from safelight.safety.azure import AzureContentSafety, Unavailable, from_environment
from safelight.verdict import CATEGORIES

CALM = dict.fromkeys(CATEGORIES, 0)


@pytest.fixture
def service() -> Iterator[Service]:
    with content_safety() as made:
        yield made


def client(service: Service, timeout: float = 8.0) -> AzureContentSafety:
    return AzureContentSafety(service.url + "/", KEY, timeout)


def test_severities_by_category(service: Service) -> None:
    assert client(service).prompt("a cube") == CALM
    assert client(service).prompt("a fight and an insult") == {**CALM, "violence": 4, "hate": 5}
    assert service.asked[0][1]["categories"] == ["Hate", "SelfHarm", "Sexual", "Violence"]
    service.picture = {"Sexual": 6}
    assert client(service).picture(Image.new("RGB", (64, 64))) == {**CALM, "sexual": 6}


def test_a_long_prompt_is_asked_about_in_parts(service: Service) -> None:
    assert client(service).prompt("x" * 12_000 + " fight")["violence"] == 4
    assert [len(text) for text in service.texts] == [10_000, 2006]
    assert client(service).prompt("") == CALM  # the service reads no empty text


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((64, 64), (64, 64)),
        ((32, 32), (50, 50)),
        ((16, 40), (50, 125)),
        ((4096, 1024), (2048, 512)),
        ((4096, 8), (2048, 50)),
    ],
)
def test_pictures_are_sent_in_a_size_that_is_looked_at(
    service: Service, size: tuple[int, int], seen: tuple[int, int]
) -> None:
    assert client(service).picture(Image.new("L", size)) == CALM
    assert service.sizes == [seen]


def test_a_busy_service_is_asked_again_within_the_time(service: Service) -> None:
    service.fail = [(429, {"retry-after": "0.1"}), (503, {})]
    assert client(service).prompt("a cube") == CALM
    service.fail = [(429, {"retry-after": "60"})]
    with pytest.raises(Unavailable, match="429"):
        client(service, timeout=1.0).prompt("a cube")


def test_what_it_says_of_an_error_does_not_quote_the_prompt(service: Service) -> None:
    service.fail = [(400, {})]
    with pytest.raises(Unavailable) as raised:
        client(service).prompt("a secret")
    assert "secret" not in str(raised.value)
    assert "400" in str(raised.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307])
def test_the_key_is_not_carried_elsewhere(service: Service, status: int) -> None:
    with content_safety() as other:
        service.fail = [(status, {"location": other.url + "/contentsafety/text:analyze"})]
        with pytest.raises(Unavailable, match=str(status)):
            client(service).prompt("a cube")
        assert other.keys == []


def test_an_endpoint_that_may_not_see_a_key() -> None:
    with pytest.raises(InvalidRequest, match="https"):
        AzureContentSafety("http://name.example", KEY)
    with pytest.raises(InvalidRequest, match="is empty"):
        AzureContentSafety("https://name.example", " ")


@pytest.mark.parametrize("fault", ["garbled", "key", "gone"])
def test_it_fails_closed(service: Service, fault: str) -> None:
    service.garbled = fault == "garbled"
    key = "wrong" if fault == "key" else KEY
    url = "http://127.0.0.1:9" if fault == "gone" else service.url
    moderation = Moderation(AzureContentSafety(url, key, 1.0))
    generator = Generator(toy_model(), moderation=moderation)
    (result,) = generator.generate("a cube", seed=1, steps=1)
    assert (result.outcome, result.image) == ("rejected", None)
    assert "could not be moderated" in result.message


def test_settings_of_the_environment(service: Service) -> None:
    given = service.environment
    assert not from_environment(ONLINE, given).of_prompt("a scratch").removed  # 2 is not above 2
    assert from_environment(BATCH, given).of_prompt("a scratch").removed
    louder = from_environment(BATCH, {**given, "CONTENT_SAFETY_THRESHOLD": "4"})
    assert not louder.of_prompt("a fight").removed
    for name, value in (
        ("CONTENT_SAFETY_KEY", ""),
        ("CONTENT_SAFETY_ENDPOINT", ""),
        ("CONTENT_SAFETY_ENDPOINT", "http://name.example"),
        ("CONTENT_SAFETY_THRESHOLD", "many"),
        ("CONTENT_SAFETY_THRESHOLD", "8"),
    ):
        with pytest.raises(InvalidRequest) as raised:
            from_environment(ONLINE, {**given, name: value})
        assert raised.value.field == name
