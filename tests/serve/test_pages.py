"""The interfaces' pages: every curl and every Python block is run, one after the other in a folder
with ``photo.png``, against a server on a port of its own; and their tables leave no field out."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from micro_systems import photo, system
from safelight.generate import Generator
from safelight.request import GenerateRequest
from safelight.serve.dialects import a1111, deepinfra, native, openai
from safelight.serve.house import House, Settings
from serving_micro import Client, serving

PAGES = Path(__file__).parents[2] / "docs" / "serve"
NAMES = ("native", "openai", "a1111", "deepinfra", "azureml")
MODELS = {
    "tiny": "sd-v1",
    "runwayml/stable-diffusion-v1-5": "sd-v1",
    "image-variations": "image-variations",
}


@functools.cache
def model(family: str) -> Any:
    return system(family).model


@pytest.fixture(scope="module")
def server() -> Iterator[Client]:
    """Micro models under the names that pages use."""
    settings = Settings(models=tuple(MODELS), azureml=True, without_checker=True)
    house = House(settings, loader=lambda name, **_: Generator(model(MODELS[name])))
    with serving(house) as client:
        yield client


def blocks(page: str) -> list[tuple[str, str]]:
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"^```(bash|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell(code: str, folder: Path) -> None:
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    run = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", code],
        cwd=folder,
        env={**environment, "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", NAMES)
def test_the_pages_calls_run(
    page: str, server: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = blocks(page)
    assert {language for language, _ in found} == {"bash", "python"}
    assert any("curl" in code for language, code in found if language == "bash")
    if shutil.which("curl") is None or shutil.which("bash") is None:
        pytest.skip("no curl")
    photo().save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    port, namespace = server.url.rsplit(":", 1)[1], {}
    for language, code in found:
        before = set(tmp_path.iterdir())
        code = code.replace("7860", port)
        if language == "bash":
            shell(code, tmp_path)
        else:
            exec(compile(code, page, "exec"), namespace)
        made = {path for path in set(tmp_path.iterdir()) - before if path.suffix != ".json"}
        assert made, f"{page}: no picture of\n{code}"
        for path in made:
            picture = Image.open(path)
            picture.load()
            assert picture.format == {".png": "PNG", ".jpg": "JPEG"}[path.suffix]


def test_deepinfras_upload_is_among_them() -> None:
    assert any("-F image=@photo.png" in code for _, code in blocks("deepinfra"))


def fields() -> dict[str, set[str]]:
    """What each interface's code knows by name."""
    return {
        "native": {*GenerateRequest.model_fields, *native._OWN},
        "openai": (openai._FIELDS - openai._OURS) | {"prompt", "image", "mask"},
        "a1111": {*a1111._FIELDS, *a1111._START, *a1111._REFUSED, "alwayson_scripts"},
        "deepinfra": set(deepinfra._FIELDS),
        "azureml": {"columns", "data", "index", "num_inference_steps", "guidance_scale", "params"},
    }


@pytest.mark.parametrize("page", NAMES)
def test_tables_name_every_field(page: str) -> None:
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    named = {name.rsplit(".", 1)[-1] for name in re.findall(r"`([\w.]+)`", rows)}
    assert fields()[page] - named == set()


def test_refused_in_the_table_is_refused_by_the_code() -> None:
    rows = (PAGES / "a1111.md").read_text(encoding="utf-8").splitlines()
    refused = {
        name
        for row in rows
        if row.startswith("|") and "| refused |" in row
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert refused == {*a1111._REFUSED, "alwayson_scripts"}
