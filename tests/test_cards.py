"""Licences and cards of the published models."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from micro_models import toy_model
from safelight import cards, model, presets
from safelight.cli.main import main
from safelight.errors import ModelNotFound
from safelight.spec import ModelSpec

PUBLISHED = {
    value.name: value
    for value in vars(presets).values()
    if isinstance(value, ModelSpec) and not value.name.startswith("tiny")
}


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(a) for a in arguments])
    return int(leaving.value.code or 0)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_published_preset_has_a_card_and_a_licence(name: str) -> None:
    found = cards.find(PUBLISHED[name])
    assert found is not None
    assert cards.card(name) == found
    assert found.licence.forbidden


@pytest.mark.parametrize(
    ("name", "licence"),
    [  # as the five published cards have it
        ("lambdalabs/sd-image-variations-diffusers", "other"),
        ("stabilityai/stable-diffusion-2-1-unclip", "openrail++"),
        ("CompVis/stable-diffusion-v1-4", "creativeml-openrail-m"),
        ("runwayml/stable-diffusion-v1-5", "creativeml-openrail-m"),
        ("OFA-Sys/small-stable-diffusion-v0/", "openrail"),
    ],
)
def test_licences(name: str, licence: str) -> None:
    assert cards.card(name).licence.key == licence


@pytest.mark.parametrize("name", cards.names())
def test_a_card_says_all_of_it(name: str) -> None:
    card = cards.card(name)
    needed = set(cards.SECTIONS) - {"safety"}
    assert {key for key, items in card.sections.items() if items} >= needed
    text = cards.markdown(card)
    assert all(f"## {cards.SECTIONS[key]}\n" in text for key in needed)
    assert "## Licence\n" in text
    assert "```bibtex\n@" in text
    assert not re.search(r"\[\w*\]\(\)|TODO|None", text)
    for alias in (*card.aliases, *card.hub):
        assert cards.card(alias) == card


def test_names_mean_one_card_each() -> None:
    known = [cards.card(name) for name in cards.names()]
    said = [name.lower() for c in known for name in (c.name, *c.aliases, *c.hub)]
    assert len(said) == len(set(said))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sd-v1-4", ["11,250 kg", "150,000 hours", "225,000", "PLMS", "red cube"]),
        ("sd-v1-5", ["595,000"]),
        ("unclip-h", ["15,000 kg", "200,000 hours", "viewer discretion", "DDIM"]),
        ("sd-v2", ["viewer discretion", "140,000"]),
        ("image-variations", ["87,000", "A6000", "batch 24", "v1-3"]),
        ("small", ["500,000", "400,000", "200,000", "Lu2022KnowledgeDO"]),
        ("x4-upscaler", ["1,250,000"]),
    ],
)
def test_the_cards_numbers(name: str, words: list[str]) -> None:
    text = cards.markdown(cards.card(name))
    assert [word for word in words if word not in text] == []


def test_shapes_of_ones_own_have_no_card() -> None:
    assert cards.find(presets.TINY) is None
    narrow = presets.SD_V1.unet.replace(channels=(32, 64, 64, 64))
    assert cards.find(presets.SD_V1.replace(unet=narrow)) is None
    renamed = presets.SD_V1.replace(name="my own fine-tune")
    assert cards.find(renamed) == cards.card("sd-v1")


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ModelNotFound, match=r"sd-v1.*x4-upscaler"):
        cards.card("sd-v9")


# -- where it is shown ----------------------------------------------------------------------------


def test_the_page_is_current() -> None:
    """``safelight card --all > docs/responsible-use.md``"""
    page = Path(__file__).parents[1] / "docs" / "responsible-use.md"
    assert page.read_text(encoding="utf-8") == cards.page()


def test_the_page_holds_every_word_of_the_cards() -> None:
    page = cards.page()
    for name in cards.names():
        card = cards.card(name)
        for text in (card.summary, card.citation, *sum(card.sections.values(), ())):
            assert text in page


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("card") == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == cards.names()
    assert run("card", "CompVis/stable-diffusion-v1-4") == 0
    assert capsys.readouterr().out == cards.markdown(cards.card("sd-v1"))
    assert run("card", "--all") == 0
    assert capsys.readouterr().out == cards.page()
    assert run("card", "unclip-l", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["licence"]["key"] == "openrail++"
    assert document["sections"]["bias"]
    assert run("card", "sd-v9") == 3
    assert "no card of 'sd-v9'" in capsys.readouterr().err


def test_a_shipped_models_own_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("card", "tiny") == 0
    assert "Apache-2.0" in capsys.readouterr().out


def test_a_published_model_has_its_licence_a_shipped_one_none() -> None:
    toy = toy_model()
    toy.spec = presets.SD_V2_768
    assert toy.card == cards.card("sd-v2-768")
    toy.source = "shipped:tiny"
    assert toy.card is None


def test_the_licence_is_told_at_the_first_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "sd"
    folder.mkdir()
    toy = toy_model()
    toy.spec = presets.SD_V1
    toy.source = str(folder)
    monkeypatch.setattr(model, "_assemble", lambda *a, **k: toy)
    contents = SimpleNamespace(spec=presets.SD_V1, tensors={})
    monkeypatch.setattr("safelight.store.folder.read_folder", lambda *a, **k: contents)
    model._tell_licence.cache_clear()
    # The command line's --quiet, in an earlier test, may have silenced it for the process.
    monkeypatch.setattr(logging.getLogger("safelight.licence"), "disabled", False)
    with caplog.at_level(logging.WARNING, logger="safelight.licence"):
        model.Model.load(folder)
        model.Model.load(folder)
    (record,) = caplog.records  # once
    assert "OpenRAIL-M" in record.message
    assert "safelight card sd-v1" in record.message
    model._tell_licence.cache_clear()


def test_info_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = toy_model()
    toy.spec = presets.UNCLIP_H
    monkeypatch.setattr(model.Model, "load", lambda *a, **k: toy)
    assert run("info", "somewhere") == 0
    out = capsys.readouterr().out
    assert "openrail++" in out
    assert out.count("forbidden ") == len(cards.card("unclip").licence.forbidden)
    assert run("info", "somewhere", "--json") == 0
    assert json.loads(capsys.readouterr().out)["licence"]["key"] == "openrail++"


def test_cards_need_no_torch() -> None:
    import subprocess

    code = (
        "import sys; from safelight.cli.main import main\n"
        "try: main(['card', 'sd-v1'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
