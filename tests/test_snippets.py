"""What the documentation tells people to type works: every ``python`` block, every command line.

Blocks of one page share a namespace and a folder, as a reader's do. In usage lines ``[...]`` is
left out (its options must exist), placeholders get values, and sampling takes two steps. What is
not run is listed with its reason, and its arguments are still parsed.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from micro_models import toy_model
from micro_systems import half_mask, photo, system
from safelight import provenance
from safelight.cli import main as door
from safelight.generate import Generator
from safelight.model import Model
from safety_micro import rigged

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/quickstart.md",
    "docs/python-api.md",
    "docs/cli.md",
    "docs/provenance.md",
    "docs/migrate.md",
    "docs/systems.md",
    "docs/safety.md",
    "docs/batch.md",
)

PLACEHOLDERS = {
    "PROMPT": "a red cube",
    "PICTURE": "picture.png",
    "IMAGE": "small.png",
    "outputs/00001-7.png": "picture.png",
    "MODEL": "tiny",
    "FILE": "picture.png",
    "DIR": "exported",
}

SENTENCE = '"a red cube on top of a blue sphere"'
PARSED_ONLY = {
    "safelight train RECIPE": "slow: trains",
    "safelight evaluate": "slow: thousands of pictures",
    "safelight doctor": "slow: compares networks with the reference",
    'safelight generate "a red cube" --sign-key key.pem --sign-cert chain.pem': "needs a key",
    'safelight generate "a wooden cabin" -m sd2-depth --image house.jpg': "needs an estimator",
    f"safelight generate {SENTENCE} -m unclip-l --prior ./karlo-v1-alpha": "needs a prior",
    "safelight models convert SRC DST": "needs a single file",
    "safelight distill RECIPE": "slow: trains",
    "safelight personalize RECIPE": "slow: trains",
    "safelight data filter TABLES -o LIST": "needs tables",
    "safelight data check PATH": "needs a data set",
    "safelight data dedup PATH": "needs a data set",
    "safelight data index PATH -o INDEX": "needs a data set",
    "safelight data search INDEX": "needs an index",
    "safelight stilllife sorted cone -o cones --count 8000 --seed 1": "slow: draws thousands",
    "safelight safety build --concepts recipes/tiny/safety.txt --examples cones --fit "
    "-o cone-checker": "needs thousands of pictures",
    "safelight batch prompts.csv -o pictures-of-ray --engine ray --workers 4 --ray-address auto": (
        "needs a cluster"
    ),
    "safelight verify outputs/00001-7.png --trust authority.pem": "needs an authority",
}
"""Line (what is in brackets left out) -> why it is not run."""

AFTER = {
    "safelight safety measure sorted-test/ --checker my-checker --plot roc.png": (
        "safelight safety build --concepts concepts.txt --examples sorted/ -o my-checker",
    )
}
"""Line -> the lines of its page that come first."""

NEEDS_WEIGHTS = re.compile(r"stable-diffusion|v1-5|sd-v2")
"""Lines that load published weights: they run with a toy in their place."""

SYSTEMS = {
    "inpainting": "inpaint",
    "depth": "depth",
    "variations": "image-variations",
    "unclip": "unclip",
    "upscaler": "x4-upscaler",
}
"""Words in the names of other published systems -> the family of the micro model in their place."""


class Service:
    """In place of the moderation service that a page leaves to its reader."""

    def prompt(self, text: str) -> dict[str, int]:
        return {"violence": 0}

    def picture(self, image: Any) -> dict[str, int]:
        return {"violence": 0}


def fences(page: str) -> list[tuple[str, str]]:
    """(language, text) of a page's fenced blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def lines(page: str) -> list[str]:
    """Command lines of a page, those behind && included."""
    found = []
    for language, block in fences(page):
        if language in ("", "bash", "sh", "console"):
            for line in re.split(r"\n|&&", block):
                line = line.strip().removeprefix("$ ")
                if line.startswith("safelight "):
                    found.append(line)
    return list(dict.fromkeys(found))


def inline(page: str) -> list[str]:
    """Commands in a page's running text."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text("utf-8"), flags=re.M | re.S)
    return sorted(set(re.findall(r"`(safelight [^`\n]+)`", text)))


def bare(line: str) -> tuple[str, list[str]]:
    """A usage line without its brackets, and the options that were in them."""
    inside = " ".join(re.findall(r"\[([^\]]*)\]", line))
    return re.sub(r"\s*\[[^\]]*\]", "", line).strip(), re.findall(r"--?[a-z][\w-]*", inside)


def words(line: str) -> list[str]:
    """Its arguments, with values for placeholders; the first of alternatives (A|B)."""
    given = [word.rstrip("…") for word in shlex.split(line)[1:]]
    return [PLACEHOLDERS.get(word.split("|")[0], word) for word in given if word]


def command_of(arguments: list[str]) -> tuple[Any, list[str]]:
    """The command that a line calls, subcommand or not, and what it is given."""
    name, *rest = [word for word in arguments if word != "--debug"]
    assert name in door.COMMANDS, f"no command {name}"
    found = door._load(name)
    while hasattr(found, "commands") and rest and rest[0] in found.commands:
        found, rest = found.commands[rest[0]], rest[1:]
    return found, rest


def options_of(command: Any) -> set[str]:
    return {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}


# -- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Model:
    """The shipped model, whose default is two steps here."""
    model = Model.load("tiny", device="cpu")
    model.spec = model.spec.replace(steps=2)
    return model


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Model) -> Path:
    """A reader's folder, with the files that pages take for granted."""

    def load(name: str | Path = "tiny", **options: Any) -> Model:
        for word, family in SYSTEMS.items():
            if word in str(name):
                made = system(family).model
                made.spec = made.spec.replace(steps=2)
                return made
        if NEEDS_WEIGHTS.search(str(name)):
            return toy_model(checker=rigged([0.1]))
        assert name in ("tiny", "tiny-v")
        return tiny

    monkeypatch.setattr(Model, "load", load)
    monkeypatch.chdir(tmp_path)
    model = Generator(tiny)
    result = model.generate("a red cube", seed=7)[0]
    provenance.save(result, tmp_path / "picture.png")
    assert result.image is not None
    for name in ("in.png", "sketch.png", "table.png", "photo.jpg", "house.jpg"):
        result.image.save(name)
    result.image.resize((16, 16)).save("small.png")
    for name in ("mask.png", "map.png"):
        half_mask(128, 128).save(name)
    (again,) = model.generate("a cone", image="in.png", strength=0.5, seed=1)
    provenance.save(again, "out.png")
    for folder in ("sorted/safe", "sorted/unsafe", "sorted-test/safe", "sorted-test/unsafe"):
        Path(folder).mkdir(parents=True)
        for k in range(2):
            picture = photo(64, 64).rotate(90 * k)
            (picture if "unsafe" in folder else result.image).save(f"{folder}/{k}.png")
    for language, block in fences("docs/batch.md"):
        if language in ("csv", "text"):
            ending = language.replace("text", "txt")
            Path(f"prompts.{ending}").write_text(re.sub(r"\b(25|12)\b", "2", block))
    Path("concepts.txt").write_text("a red cube\nspecial: a cone\n", encoding="utf-8")
    return tmp_path


WITH_PYTHON = [page for page in PAGES if "python" in dict(fences(page))]


@pytest.mark.parametrize("page", WITH_PYTHON)
@pytest.mark.usefixtures("desk")
def test_python_blocks_run(page: str) -> None:
    namespace: dict[str, Any] = {"service": Service()}
    for language, block in fences(page):
        if language == "python":
            code = re.sub(r"steps=\d+", "steps=2", block)
            exec(compile(code, page, "exec"), namespace)


@pytest.mark.parametrize(("page", "line"), [(page, line) for page in PAGES for line in lines(page)])
@pytest.mark.usefixtures("desk")
def test_command_lines_run(page: str, line: str) -> None:
    line, optional = bare(line)
    arguments = words(line)
    command, rest = command_of(arguments)
    assert set(optional) <= options_of(command)
    if line in PARSED_ONLY:
        command.make_context(arguments[0], rest)
        return
    for each in (*AFTER.get(line, ()), line):
        with pytest.raises(SystemExit) as leaving:
            door.main(words(each))
        assert not leaving.value.code, f"{page}: {each}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_running_text_exist(page: str) -> None:
    for line in inline(page):
        if line.startswith("safelight COMMAND") or re.match(r"safelight -", line):
            continue
        plain, optional = bare(line.replace("…", ""))
        command, rest = command_of(words(plain))
        given = [word.split("=")[0] for word in rest if word.startswith("-")]
        assert {*given, *optional} <= options_of(command), f"{page}: {line}"


def test_what_is_not_run_is_still_there() -> None:
    """The list of exceptions does not outlive what it excepts."""
    there = {bare(line)[0] for page in PAGES for line in lines(page)}
    assert set(PARSED_ONLY) <= there
    assert {line for rows in AFTER.items() for line in (rows[0], *rows[1])} <= there


def test_a_wrong_option_in_a_page_is_found() -> None:
    command, rest = command_of(words('safelight generate "a cone" --stepz 3'))
    with pytest.raises(Exception, match="No such option"):
        command.make_context("generate", rest)
    with pytest.raises(AssertionError, match="no command"):
        command_of(words("safelight paint"))
