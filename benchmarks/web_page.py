"""The web page, used as a person would: ``python -m benchmarks.web_page [--model NAME]``.

Starts ``safelight ui`` with shipped models, drives it in headless Chromium (needs the package
``playwright`` and a Chromium, ``--chromium`` says where) and checks at each station that what a
visitor expects is there: a picture from words with previews, the same picture again from its
settings, a picture from a picture, a painted mask, what a model cannot do, a grid, a cancelled
run, an error that names its field, a dropped file, a telephone. No request may leave this machine.

Writes ``docs/assets/ui/*.jpg`` and prints what took how long.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parents[1] / "docs" / "assets" / "ui"
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SHOWN = """() => [...document.images].every(
  i => i.complete || i.getBoundingClientRect().top > innerHeight)"""
CUBE = "a red cube on top of a blue sphere"


def chromium() -> str | None:
    """Where Chromium is; None where there is none."""
    named = os.environ.get("SAFELIGHT_CHROMIUM")
    names = ("chromium", "chromium-browser", "google-chrome")
    return named or next((path for name in names if (path := shutil.which(name))), None)


@contextlib.contextmanager
def browser(executable: str) -> Iterator[Any]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=executable, args=FLAGS)
        try:
            yield opened
        finally:
            opened.close()


class Person:
    """Somebody in front of the page.

    Args:
        browser: Playwright's.
        url: the server.
        wait: seconds of patience for anything.
    """

    def __init__(
        self, browser: Any, url: str, *, width: int = 1280, height: int = 900, wait: float = 45
    ) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(wait * 1000)
        self.url, self.foreign, self.broken = url, [], []
        self.page.on("request", self._asked)
        self.page.on("pageerror", lambda error: self.broken.append(str(error)))
        self.page.on("console", self._heard)
        self.page.goto(url)
        self.page.wait_for_selector("#sl-generate")
        time.sleep(1.0)  # what it asks when it is there

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.foreign.append(request.url)

    def _heard(self, message: Any) -> None:
        if message.type == "error":
            self.broken.append(message.text)

    # -- hands ---------------------------------------------------------------------------------

    def write(self, label: str, text: str) -> None:
        """Into the field of that name."""
        field = self.page.get_by_label(label, exact=True).first
        field.fill(text)
        field.blur()

    def slide(self, label: str, value: float) -> None:
        """A slider's number."""
        self.write(f"number input for {label}", str(value))

    def tab(self, name: str) -> None:
        """Of the page, or of what to start from."""
        self.page.get_by_role("tab", name=name, exact=True).click()

    def press(self, name: str) -> None:
        """A button."""
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").click()

    def pick(self, label: str, value: str) -> None:
        """From a list."""
        self.page.get_by_label(label, exact=True).first.click()
        self.page.get_by_role("option", name=value, exact=True).first.click()

    def upload(self, place: str, file: str | Path) -> None:
        """A picture, into the control with that id."""
        self.page.set_input_files(f"{place} input[type=file]", str(file))
        self.page.wait_for_selector(f"{place} :is(img, canvas)")

    def under_the_brush(self, place: str, file: str | Path) -> None:
        """A picture into an editor, once that has set itself up."""
        self.page.wait_for_selector(f"{place} canvas")
        time.sleep(4.0)  # it shows its canvas before it can take a picture
        self.page.set_input_files(f"{place} input[type=file]", str(file))
        time.sleep(2.0)

    def paint(self, place: str, rows: int = 6) -> None:
        """Over the upper left quarter of an editor."""
        canvas = self.page.locator(f"{place} canvas").first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        left, top = box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.3
        for row in range(rows):
            y = top + row * box["height"] * 0.05
            self.page.mouse.move(left, y)
            self.page.mouse.down()
            self.page.mouse.move(left + box["width"] * 0.3, y, steps=6)
            self.page.mouse.up()
        time.sleep(1.0)  # the editor hands its layers over in its own time

    # -- eyes ----------------------------------------------------------------------------------

    def stage(self) -> str:
        """What the page says of the run."""
        return self.page.locator("#sl-stage .sl-stage").inner_text()

    def finished(self) -> str:
        """Wait for the end of a run; what the page says then."""
        new = "#sl-stage .sl-stage:not([data-old])"
        self.page.wait_for_selector(f"{new}.done, {new}:has(.sl-alert)")
        self.page.wait_for_selector("#sl-generate:not([disabled])")
        return self.stage()

    def generate(self) -> str:
        """Press the button, and wait."""
        self.begin()
        return self.finished()

    def begin(self) -> None:
        """Press the button; what is on the stage by then is of the run before."""
        self.page.evaluate("document.querySelector('#sl-stage .sl-stage').dataset.old = 1")
        self.press("Generate")

    def picture(self, place: str = "#sl-gallery", at: int = 0) -> bytes:
        """The file behind a picture on show."""
        image = self.page.locator(f"{place} img").nth(at)
        image.wait_for()
        return self.page.request.get(image.get_attribute("src")).body()

    def shoot(self, name: str, folder: Path | None, whole: bool = False) -> None:
        """A screenshot."""
        if folder is not None:
            self.page.mouse.move(0, 0)
            self.page.wait_for_function(SHOWN)
            time.sleep(0.4)
            path = folder / f"{name}.jpg"
            self.page.screenshot(path=path, type="jpeg", quality=76, full_page=whole)

    def top(self) -> None:
        """Back to the head of the page."""
        self.page.evaluate("scrollTo(0, 0)")


# -- the walk --------------------------------------------------------------------------------------


def walk(person: Person, scratch: Path, folder: Path | None = None) -> Iterator[str]:
    """Every station; yields what was seen there.

    Raises:
        AssertionError: something that a visitor expects is not there.
    """
    page = person.page
    person.shoot("start", folder)
    person.write("Prompt", CUBE)
    person.write("Seed", "7")
    began = time.monotonic()
    person.begin()
    page.wait_for_selector("#sl-stage img.preview")
    yield f"first preview after {time.monotonic() - began:.1f} s: {person.stage().strip()}"
    person.shoot("running", folder)
    said = person.finished()
    assert "1 picture" in said, said
    first = person.picture()
    (scratch / "first.png").write_bytes(first)
    yield f"text to image: {said.strip()}"

    page.get_by_text("Settings of this picture").click()
    page.wait_for_selector("#sl-out .sl-details")
    person.shoot("made", folder, whole=True)
    person.write("Prompt", "something else")
    person.write("Seed", "99")
    person.press("Use these settings")
    page.wait_for_function("document.querySelector('#sl-prompt textarea').value.includes('cube')")
    person.generate()
    assert person.picture() == first, "the same settings gave another file"
    yield "use these settings: the same file, bit by bit"

    person.press("To image to image")
    page.wait_for_selector("#sl-image img")
    person.write("Prompt", "a green cone on top of a blue sphere")
    person.write("Seed", "7")
    said = person.generate()
    assert "1 picture" in said, said
    person.top()
    person.shoot("image", folder)
    yield f"image to image: {said.strip()}"

    yield from _mask(person, scratch, folder)
    yield from _others(person, scratch, folder)
    yield from _ends(person, scratch, folder)


def _mask(person: Person, scratch: Path, folder: Path | None) -> Iterator[str]:
    person.top()
    person.tab("Inpaint")
    person.under_the_brush("#sl-drawing", scratch / "first.png")
    person.paint("#sl-drawing")
    person.write("Prompt", "a yellow cylinder on top of a blue sphere")
    said = person.generate()
    assert "1 picture" in said, said
    person.top()
    person.shoot("inpaint", folder)
    assert "mask" in person.page.locator("#sl-out").inner_html().lower()
    yield f"inpainting with a painted mask: {said.strip()}"


def _others(person: Person, scratch: Path, folder: Path | None) -> Iterator[str]:
    for tab, need in (("Variations", "looks at pictures"), ("Upscale", "x4-upscaler")):
        person.top()
        person.tab(tab)
        note = person.page.locator(".sl-note:visible").inner_text()
        assert need in note, note
        said = person.generate()
        assert "Model" in said, said
        assert "cannot do" in said, said
        yield f"{tab}: {note}"
    person.tab("Grid")
    person.write("Prompt", CUBE)
    person.write("X values", "1-3")
    person.write("Y values", "1, 3, 6")
    person.slide("Steps", 12)
    said = person.generate()
    assert "9 pictures" in said, said
    person.top()
    person.shoot("grid", folder)
    (scratch / "grid.png").write_bytes(person.picture())
    yield f"grid: {said.strip()}"


def _ends(person: Person, scratch: Path, folder: Path | None) -> Iterator[str]:
    page = person.page
    person.top()
    person.tab("Text")
    person.slide("Steps", 400)
    person.begin()
    page.wait_for_selector("#sl-stage .bar")
    page.wait_for_function("document.querySelector('#sl-stage').innerText.includes('Step')")
    began = time.monotonic()
    person.press("Cancel")
    said = person.finished()
    assert "Cancelled" in said, said
    yield f"cancelled within {time.monotonic() - began:.2f} s, the page included"

    person.write("Seed", "seven")
    said = person.generate()
    assert "Seed" in said, said
    assert "whole number" in said, said
    person.top()
    person.shoot("error", folder)
    yield f"an error: {said.strip()}"

    person.tab("History")
    page.wait_for_selector("#sl-past-gallery img")
    person.upload("#sl-dropped", scratch / "first.png")
    page.wait_for_selector("#sl-dropped-use:not([disabled])")
    person.shoot("history", folder)
    person.press("Use this picture’s settings")
    page.wait_for_selector("#sl-generate")
    assert page.locator("#sl-seed textarea, #sl-seed input").first.input_value() == "7"
    yield "a dropped file's settings are back"

    page.get_by_role("link", name="Responsible use").click()
    page.wait_for_selector("#sl-responsible-use:visible")
    yield "the footer leads to responsible use"


def telephone(browser: Any, url: str, folder: Path | None = None) -> Person:
    """The same on 390 pixels: nothing may be wider than the screen, every tab in reach."""
    person = Person(browser, url, width=390, height=844)
    wide = person.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390, f"the page is {wide} pixels wide"
    person.write("Prompt", CUBE)
    person.write("Seed", "7")
    person.tab("Grid")
    person.tab("Text")
    said = person.generate()
    assert "1 picture" in said, said
    person.shoot("telephone", folder)
    return person


@contextlib.contextmanager
def served(models: list[str]) -> Iterator[str]:
    """``safelight ui`` on a free port, as a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    chosen = [part for name in models for part in ("-m", name)]
    command = [sys.executable, "-m", "safelight", "ui", "--port", str(port), *chosen]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/healthz", timeout=5)
                break
            assert process.poll() is None, "the server has ended"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    """The whole walk, and the documentation's screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--model", action="append", default=[], help="several times for several")
    parser.add_argument("--chromium", default=chromium(), help="the browser's executable")
    parser.add_argument("--no-screenshots", action="store_true")
    arguments = parser.parse_args()
    if arguments.chromium is None:
        parser.error("no Chromium; install one, or name it with --chromium")
    folder = None if arguments.no_screenshots else ASSETS
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        served(arguments.model) as url,
        browser(arguments.chromium) as opened,
    ):
        person = Person(opened, url)
        for seen in walk(person, Path(scratch), folder):
            print(f"- {seen}", flush=True)
        small = telephone(opened, url, folder)
        print("- 390 pixels: nothing is cut off")
        for each in (person, small):
            assert each.foreign == [], each.foreign
            assert each.broken == [], each.broken
        print("- no request left this machine, no error in the browser's log")


_Raw = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    main()
