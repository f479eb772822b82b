"""The drawing in docs/architecture.md is true: imports only go down.

Read from the ``ast`` of every file, so that imports inside functions, under ``TYPE_CHECKING``
and by ``import_module("...")`` count too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "safelight"

# A unit is a file or a folder of src/safelight; "" is safelight/__init__.py.
RECORDS = {
    *("errors", "spec", "presets", "fast", "request", "fields", "inputs", "names"),
    *("verdict", "family", "cards"),
}
COLUMNS = {"diffusion", "nets", "store", "text"}
ASSEMBLY = {
    *("model", "shipped", "checker", "adapters", "convert", "parts"),
    *("conditioning", "runtime", "engine"),
}
RIVERS = {"generate", "batch", "safety", "provenance", "data", "train", "evaluate"}
DOORS = {"serve", "ui", "compat", "cli", "__main__"}
HOUSE = RECORDS | COLUMNS | ASSEMBLY | RIVERS

# What each unit may import, itself aside. "serve.client" is that one module of serve.
ARROWS = {
    **dict.fromkeys(RECORDS, RECORDS),
    **dict.fromkeys(COLUMNS, RECORDS),
    **dict.fromkeys(ASSEMBLY, RECORDS | COLUMNS | ASSEMBLY),
    **dict.fromkeys(RIVERS, RECORDS | COLUMNS | ASSEMBLY),
    **dict.fromkeys(DOORS, HOUSE),
    "": HOUSE,
}
for unit, more in {
    "generate": {"safety", "provenance"},
    "batch": {"generate", "safety", "provenance"},
    "train": {"data"},
    "evaluate": {"data", "generate"},
    "ui": {"serve.client"},
    "cli": {"serve", "ui"},
    "__main__": {"cli"},
}.items():
    ARROWS[unit] = ARROWS[unit] | more

# Other people's packages that only some units may import.
FOREIGN = {
    "torch": set(ARROWS) - RECORDS - {""},
    "diffusers": DOORS,  # the peer that `doctor` compares with
    "gradio": {"ui", "cli"},
    "transformers": DOORS | {"conditioning"},  # the depth estimator, an extra
}

DYNAMIC = {"import_module", "__import__", "resolve_name", "run_module"}


def imports(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Every (line, dotted name) that ``file`` imports. A name may be a module or in one.

    An import by a computed name stands for every string in the file that looks like a module
    of ours; where there is none, it yields "?".
    """
    package = ["safelight", *file.relative_to(root).parts[:-1]]
    tree = ast.parse(file.read_text(encoding="utf-8"), file)
    dynamic = set(DYNAMIC)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            path = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, f"{path}.{alias.name}") for alias in node.names)
            dynamic |= {a.asname for a in node.names if a.name in DYNAMIC and a.asname}
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    ours = [s for s in strings if isinstance(s, str) and re.fullmatch(r"safelight(\.\w+)+\.?", s)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            if name in dynamic:
                match node.args[0]:
                    case ast.Constant(value=str(path)) if not path.startswith("."):
                        yield node.lineno, path.replace(":", ".")
                    case _:
                        yield from ((node.lineno, path) for path in ours or ["?"])


def violations(root: Path) -> list[str]:
    """What in the package at ``root`` goes against the arrows, one line each."""
    found = []
    for file in sorted(root.rglob("*.py")):
        unit = file.relative_to(root).parts[0].removesuffix(".py").replace("__init__", "")
        where = file.relative_to(root.parent)
        if unit not in ARROWS:
            found.append(f"{where}: {unit} has no place in the drawing")
            continue
        for line, name in imports(file, root):
            top, _, inner = name.partition(".")
            if top == "safelight":
                to = inner.split(".")[0]
                if to in (unit, "__version__") or (to == "" and unit in DOORS):
                    continue
                if to in ARROWS[unit] or ".".join(inner.split(".")[:2]) in ARROWS[unit]:
                    continue
            elif name != "?" and unit in FOREIGN.get(top, ARROWS):
                continue
            found.append(f"{where}:{line}: {unit or 'safelight'} may not import {name}")
    return found


def test_imports_only_go_down() -> None:
    assert violations(SOURCE) == []


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("spec.py", "from safelight.model import Model"),
        ("spec.py", "import torch"),
        ("request.py", "def f():\n    import torch.nn as nn"),
        ("diffusion/grid.py", "from safelight.nets.unet import UNet"),
        ("diffusion/grid.py", "from safelight import nets"),
        ("nets/unet.py", "from ..store import weights"),
        ("nets/deep/er.py", "from ...store.weights import load"),
        ("text/tokenizer.py", "def f():\n    import safelight.store.folder"),
        ("store/folder.py", "if TYPE_CHECKING:\n    from safelight.nets import unet"),
        ("batch/rows.py", "from safelight.cli import adapters"),
        ("batch/rows.py", "from safelight.serve import wire"),
        ("batch/table.py", "from safelight.data import tables"),
        ("generate/course.py", "from safelight.batch import window"),
        ("store/hub.py", "import safelight"),
        ("store/hub.py", "from safelight import load"),
        ("model.py", "import importlib\nimportlib.import_module('safelight.generate')"),
        ("engine.py", "from importlib import import_module as get\nget('safelight.train')"),
        ("engine.py", "__import__('safelight.cli.main')"),
        ("runtime/plan.py", "from importlib import import_module\ndef f(n): import_module(n)"),
        ("conditioning/text.py", "import importlib as i\ni.import_module(f'safelight.serve.{x}')"),
        ("safety.py", "t = {'a': 'safelight.ui'}\nimport_module(t['a'])"),
        ("train/loop.py", "from safelight.generate import Generator"),
        ("train/card.py", "from safelight.evaluate import judge"),
        ("generate.py", "from safelight.train import ema"),
        ("generate.py", "import diffusers"),
        ("data/folders.py", "from safelight.cli import main"),
        ("serve/app.py", "from safelight.ui import page"),
        ("ui/page.py", "from safelight.serve.app import app"),
        ("compat/faces.py", "from safelight.serve import client"),
        ("serve/app.py", "import gradio"),
        ("ui/desk.py", "from safelight.serve.local import Local"),
        ("utils.py", ""),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(tmp_path: Path, file: str, code: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(code, encoding="utf-8")
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("__init__.py", "t = {'load': 'safelight.generate'}\nimport_module(t['load'])"),
        ("presets.py", "from safelight.spec import UNetSpec"),
        ("nets/unet.py", "import torch\nfrom . import attention\nfrom .layers import Norm"),
        ("model.py", "from safelight import __version__, nets, store"),
        ("engine.py", "from safelight.conditioning.text import encode"),
        ("batch/window.py", "from safelight.generate import Generator"),
        ("evaluate/report.py", "from safelight import data\nfrom safelight.generate import load"),
        ("train/loop.py", "from ..data.stilllife import world"),
        ("compat/faces.py", "import safelight"),
        ("ui/page.py", "from safelight.serve.client import Client"),
        ("ui/page.py", "from safelight.serve import client"),
        ("ui/page.py", "import gradio as gr"),
        ("cli/serve.py", "def f():\n    from safelight.serve import app"),
        ("cli/doctor.py", "def f():\n    import diffusers"),
    ],
)  # fmt: skip
def test_an_arrow_of_the_drawing_passes(tmp_path: Path, file: str, code: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(code, encoding="utf-8")
    assert violations(tmp_path) == []
