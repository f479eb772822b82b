"""``python -m benchmarks.systems``: the kept table is in the docs, and its checks can fail."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from benchmarks import parity, systems
from benchmarks.systems_cases import SYSTEMS, System

from safelight.model import Model
from safelight.spec import ModelSpec


def system(words: str) -> System:
    return next(each for each in SYSTEMS if words in each.name)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "SAMPLERS", ("pndm",))
    monkeypatch.setattr(systems, "SCALES", (5.0,))


def test_the_page_shows_the_kept_results() -> None:
    kept = systems.newest("systems")[0]
    assert [row["system"] for row in kept["systems"]] == [each.name for each in SYSTEMS]
    page = systems.PAGE.read_text(encoding="utf-8")
    table = systems.table(kept, systems.newest("parity"))
    assert systems.into_page(table, page) == page, "run: python -m benchmarks.systems --table"
    assert "**no**" not in table


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("words", ["v1, text", "unCLIP l with the prior"])
def test_a_system_agrees(words: str) -> None:
    row = systems.check(system(words))
    assert {name: cell.problem for name, cell in row.cells.items() if not cell.ok} == {}
    assert row.micro.difference is not None
    assert 0 < row.micro.difference < systems.LIMIT
    assert row.exports.difference == 0
    assert row.folder.tensors > 100


def wrong_prediction(model: Model) -> None:
    schedule = model.spec.schedule.replace(prediction_type="v")
    model.__init__(**{**vars_of(model), "spec": model.spec.replace(schedule=schedule)})


def one_number(model: Model) -> None:
    with torch.no_grad():
        bias = model.unet.conv_out.bias
        bias[0] += 0.01


def vars_of(model: Model) -> dict[str, object]:
    return {name: getattr(model, name) for name in model.__dataclass_fields__}


@pytest.mark.usefixtures("quick")
def test_planted_faults_are_in_their_cells() -> None:
    names = ("folder", "single", "micro")
    found = systems.check(system("v1, text"), wrong_prediction, names)
    assert [name for name in names if not found.cells[name].ok] == ["single", "micro"]
    assert "differs by" in found.micro.problem
    found = systems.check(system("v1, text"), one_number, names)
    assert [name for name in names if not found.cells[name].ok] == list(names)
    assert "conv_out.bias is another" in found.folder.problem
    text = systems.shown(asdict(found.folder), "yes")
    assert text.startswith("**no**: AssertionError")


@pytest.mark.usefixtures("quick")
def test_a_broken_export_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Model._loaded.__func__

    def without_statistics(cls: type[Model], *given: object, **more: object) -> Model:
        model = original(cls, *given, **more)
        model.normaliser = None
        return model

    monkeypatch.setattr(Model, "_loaded", classmethod(without_statistics))
    found = systems.check(system("unCLIP l"), names=("micro", "exports"))
    assert not found.exports.ok
    assert not found.micro.ok


def test_the_column_of_the_full_size_is_what_was_kept() -> None:
    spec: ModelSpec = parity.SYSTEMS["sd15"].replace(vision=None)
    row = {"systems": ["sd15"], "part": "unet", "taps": [{"relative": 2e-6}]}
    kept = [{"networks": [row, {**row, "part": "vae decode"}]}]
    assert systems.full_size(spec, kept) == "unet 2.0e-06, vae 2.0e-06; not run: text"
    row["taps"] = [{"relative": 0.0}, {"relative": 0.5}]
    assert "unet 5.0e-01" in systems.full_size(spec, kept)
    assert json.loads(json.dumps(asdict(systems.Row("a", "b"))))["micro"]["problem"] == "not run"
