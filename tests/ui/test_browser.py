"""The page in a browser, used as a person would, over models that answer in no time.

``python -m benchmarks.web_page`` is the long walk, with the shipped models.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from benchmarks import web_page
from PIL import Image

from micro_systems import photo, system
from safelight import provenance
from safelight.cli import ui
from safelight.serve.app import create_app
from safelight.serve.house import House, Settings

CHROMIUM = web_page.chromium()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
]
visitors: list[Any] = []  # the desk, to see who is there
MODELS = {"words": "sd-v1", "looker": "image-variations", "large": "x4-upscaler"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    house = House(Settings(models=tuple(MODELS)), loader=lambda name, **_: system(MODELS[name]))
    for name in MODELS:
        house.worker(name)
    app = ui.with_page(create_app(house=house))
    server = uvicorn.Server(
        uvicorn.Config(
            app, port=0, log_level="error", access_log=False, timeout_graceful_shutdown=1
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    visitors.append(app.state.desk)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with web_page.browser(CHROMIUM or "") as opened:
        yield opened


@pytest.fixture(scope="module")
def visitor(browser: Any, url: str) -> web_page.Person:
    """One page for all tests: opening it is what takes long."""
    return web_page.Person(browser, url, wait=30)


@pytest.fixture
def person(visitor: web_page.Person) -> Iterator[web_page.Person]:
    visitor.tab("Create")
    visitor.tab("Text")
    visitor.write("Seed", "")
    yield visitor
    assert visitor.foreign == []
    assert visitor.broken == []


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    photo(64, 64).save(path)
    return path


def test_words_to_a_picture_and_its_settings_back(person: web_page.Person, tmp_path: Path) -> None:
    person.write("Prompt", "a red cube")
    person.write("Seed", "7")
    person.slide("Steps", 4)
    assert "1 picture" in person.generate()
    first = tmp_path / "first.png"
    first.write_bytes(person.picture())
    read = provenance.read(first)
    assert (read.request.seed, read.request.steps, read.request.prompt) == (7, 4, "a red cube")
    assert Image.open(first).size == (32, 32)

    person.write("Prompt", "something else")
    person.tab("History")
    person.upload("#sl-dropped", first)
    person.press("Use this picture’s settings")
    person.page.wait_for_function(
        "document.querySelector('#sl-prompt textarea').value === 'a red cube'"
    )
    assert "1 picture" in person.generate()
    assert person.picture() == first.read_bytes()


def test_enter_generates_and_cancel_stops(person: web_page.Person) -> None:
    field = person.page.get_by_label("Prompt", exact=True).first
    field.fill("a red cube")
    person.slide("Steps", 512)
    person.slide("Pictures", 4)
    person.page.evaluate("document.querySelector('#sl-stage .sl-stage').dataset.old = 1")
    field.press("Enter")
    person.page.wait_for_selector("#sl-cancel:not([disabled])")
    person.page.wait_for_selector("#sl-stage .bar")
    person.press("Cancel")
    assert "Cancelled" in person.finished()
    person.slide("Steps", 4)
    person.slide("Pictures", 1)


def test_a_painted_mask(person: web_page.Person, picture: Path) -> None:
    person.write("Prompt", "a red cube")
    person.write("Seed", "1")
    person.slide("Steps", 4)
    person.tab("Inpaint")
    person.under_the_brush("#sl-drawing", picture)
    person.paint("#sl-drawing", rows=3)
    assert "1 picture" in person.generate()


def test_models_that_look_and_that_enlarge(person: web_page.Person, picture: Path) -> None:
    person.tab("Variations")
    assert "looker" in person.page.locator(".sl-note:visible").inner_text()
    person.pick("Model", "looker")
    person.page.wait_for_selector(".sl-note:visible", state="hidden")
    person.upload("#sl-look", picture)
    person.write("Prompt", "")
    assert "1 picture" in person.generate()
    person.pick("Model", "large")
    person.tab("Upscale")
    person.write("Prompt", "a red cube")
    person.upload("#sl-small", picture)
    person.slide("Steps", 3)
    said = person.generate()
    assert "1 picture" in said, said
    person.pick("Model", "words")


def test_an_error_names_its_field(person: web_page.Person) -> None:
    person.write("Seed", "seven")
    person.write("Prompt", "a red cube")
    assert "Seed" in person.generate()
    person.write("Seed", "")
    person.write("Prompt", "")
    assert "Prompt is empty" in person.generate()


def test_on_a_telephone_with_every_control_named(person: web_page.Person) -> None:
    page = person.page
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for tab in ("Image", "Inpaint", "Variations", "Upscale", "Grid", "Text"):
        person.tab(tab)  # all in reach, none behind a menu
        assert page.evaluate(NAMELESS) == []


def test_who_closes_the_page_is_forgotten(person: web_page.Person) -> None:
    (desk,) = visitors
    folders = [session.folder for session in desk._sessions.values()]
    assert any(list(folder.iterdir()) for folder in folders)
    person.page.close()
    end = time.monotonic() + 20
    while any(folder.exists() for folder in folders) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(folder.exists() for folder in folders)


NAMELESS = """() => [...document.querySelectorAll('input, textarea, button, a, [role=tab]')]
  .filter(e => e.offsetParent !== null && !e.closest('[aria-hidden=true]') && e.type !== 'file')
  .filter(e => !(e.getAttribute('aria-label') || e.title || e.textContent.trim()
    || [...(e.labels ?? [])].map(l => l.textContent).join('').trim()))
  .map(e => e.outerHTML.slice(0, 200))"""
