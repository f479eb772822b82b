"""Side by side with peers: the cases, the turns, the table, the gate; real sides at micro size."""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from benchmarks.compare import __main__ as command
from benchmarks.compare import cases, cpp, driver, inputs, plots, process, report, worker
from benchmarks.compare.cases import EAGER, OURS, Case

STUB = """
import json, sys, time
side = sys.argv[3]
for line in sys.stdin:
    asked = json.loads(line)
    if side == "onnxruntime" and asked["do"] == "export":
        reply = {"failed": "ImportError: no module"}
    elif side == "openvino" and asked["do"] == "run":
        sys.stderr.write("went wrong\\n")
        sys.exit(7)
    else:
        seconds = {"safelight": 1.0, "diffusers": 1.5}.get(side, 0.5)
        if asked.get("keep"):
            import numpy as np
            np.save(asked["keep"], np.full((1, 4, 2, 2), 3.0) + np.arange(16).reshape(1, 4, 2, 2)
                    + (0.5 if side == "safelight" else 0))
        reply = {"seconds": seconds, "peak_mib": 100.0}
    print(json.dumps(reply), flush=True)
"""
STEP = Case("micro", "step", 16)


# -- cases ----------------------------------------------------------------------------------------


def test_arithmetic_is_that_of_the_accounting() -> None:
    """The published sizes' counts (docs of performance): 803 GFLOP a sample at 512², 2514 to
    decode."""
    step = cases.flops(Case("sd15", "step", 512))
    assert step / 2e9 == pytest.approx(803, rel=0.01)
    assert cases.flops(Case("sd15", "decode", 512)) / 1e9 == pytest.approx(2514, rel=0.01)
    assert cases.flops(Case("sd15", "step", 512, 4)) == 4 * step
    whole = cases.flops(Case("sd15", "picture", 512))
    assert whole == 20 * step + cases.flops(Case("sd15", "decode", 512))


def test_keys_are_read_back() -> None:
    for case in [*cases.every(), *cases.choose(rehearsal=True)]:
        assert cases.parse(case.key).key == case.key
    assert cases.choose(keys=["sd15-step-384-x2"]) == [Case("sd15", "step", 384, 2)]
    assert {c.kind for c in cases.choose(models=["tiny"])} == set(cases.KINDS)
    for wrong in ("sd15", "sd15-step-100", "sd3-step-512", "sd15-jump-512", "sd15-step-512-x0"):
        with pytest.raises(ValueError, match=r"sd15|models"):
            cases.parse(wrong)


def test_the_issue_is_covered() -> None:
    have = {(c.model, c.kind, c.size) for c in cases.every()}
    for model in ("sd15", "sd21", "small"):
        assert {(model, "step", size) for size in (256, 512, 768)} <= have
    assert {("sd15", kind, 512) for kind in cases.KINDS} <= have
    assert {c.batch for c in cases.every()} == {1, 4}
    assert len({c.key for c in cases.every()}) == len(cases.every())


def test_groups_fit_and_hold_ours() -> None:
    case = Case("sd15", "step", 512)
    sides = [side for side in cases.SIDES if side != "sd.cpp-q8"]
    for room in (8.0, 20.0, 24.0, 64.0):
        found = driver.groups(case, sides, room)
        assert all(group[0] == OURS for group in found)
        assert [side for group in found for side in group[1:]] == sides[1:]
        for group in found:
            together = sum(cases.memory_gib(case, side) for side in group)
            assert together <= room or len(group) == 2
    assert len(driver.groups(case, sides, 8.0)) == len(sides) - 1
    assert len(driver.groups(case, sides, 64.0)) == 1
    assert driver.groups(case, [OURS], 8.0) == [[OURS]]


def test_both_branches_without_a_prompt_first() -> None:
    given = inputs.of(Case("micro", "step", 16, 2))
    x, contexts = inputs.guided(given)
    assert x.shape[0] == contexts.shape[0] == 4
    assert np.array_equal(x[:2], x[2:])
    assert np.array_equal(contexts[0], given.empty[0])
    assert np.array_equal(contexts[2:], given.prompts)
    assert np.array_equal(inputs.of(Case("micro", "step", 16, 2)).latents, given.latents)


# -- turns ----------------------------------------------------------------------------------------


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> driver.Settings:
    """Workers that answer at once: ours in 1 s, diffusers in 1.5, one fails, one dies."""
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    real = process.subprocess.Popen

    def spawn(call: list[str], **options: Any) -> Any:
        return real([sys.executable, str(stub), *call[1:]], **options)

    monkeypatch.setattr(process.subprocess, "Popen", spawn)
    monkeypatch.setattr(driver, "REST", 0.0)
    return driver.Settings(cache=tmp_path, threads=1, rounds=3, force=True, patience=60)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.measure, "quiet", lambda **_: True)


def measured(settings: driver.Settings, sides: list[str], *chosen: Case) -> list[driver.Line]:
    return driver.run(chosen, sides, settings, settings.cache / "run.jsonl", lambda _: None)


def test_a_peer_that_fails_is_a_row_with_its_reason(stubs: driver.Settings) -> None:
    lines = measured(stubs, [OURS, EAGER, "openvino", "onnxruntime"], STEP)
    found = {row.side: row for row in report.rows(lines)}
    assert found[EAGER].ratio == 1.5
    assert found[EAGER].seconds == 1.5
    assert found[OURS].max_abs == 0.5
    assert found["onnxruntime"].failed == "ImportError: no module"
    assert found["openvino"].failed == "ended with 7: went wrong"
    text = report.markdown(list(found.values()), {"Processor": "a chip"})
    assert "| ONNX Runtime, static shapes, float32 | ImportError: no module |" in text
    assert "**1.50** | 1.50–1.50" in text


def test_a_killed_run_goes_on(stubs: driver.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    later = Case("micro", "decode", 16)
    measured(stubs, [OURS, EAGER], STEP)
    record = stubs.cache / "run.jsonl"
    with record.open("a") as file:
        file.write('{"case": "micro-dec')  # cut off by the kill
    asked: list[str] = []
    kept = driver.measured

    def watched(case: Case, *rest: Any) -> driver.Line:
        asked.append(case.key)
        return kept(case, *rest)

    monkeypatch.setattr(driver, "measured", watched)
    lines = measured(stubs, [OURS, EAGER], STEP, later)
    assert asked == [later.key]
    assert [line["case"] for line in lines] == [STEP.key, later.key]
    assert [line["case"] for line in driver.read(record)] == [STEP.key, later.key]


def test_a_busy_machine_stops_it(stubs: driver.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(**_: Any) -> bool:
        raise SystemExit("Something else uses 1.0 cores")

    monkeypatch.setattr(driver.measure, "quiet", busy)
    with pytest.raises(driver.Busy, match=r"1\.0 cores"):
        measured(stubs, [OURS, EAGER], STEP)


def test_patience_ends(stubs: driver.Settings, tmp_path: Path) -> None:
    (tmp_path / "stub.py").write_text("import time; time.sleep(60)")
    slow = process.Process(EAGER, "micro", tmp_path, threads=1, patience=0.2)
    with pytest.raises(process.Failed, match="took more than"):
        slow.ask("load", STEP)
    slow.end()


def test_agreement() -> None:
    draw = np.random.default_rng(0)
    expected = draw.standard_normal((1, 4, 8, 8)).astype(np.float32)
    moved = expected.copy()
    moved[0, 0, 0, 0] += 0.25
    found = driver.apart(moved, expected)
    assert found["max_abs"] == pytest.approx(0.25)
    assert found["relative"] == pytest.approx(0.25 / expected.std(), rel=1e-5)
    assert "psnr" not in found
    picture = draw.integers(0, 255, (1, 8, 8, 3), dtype=np.uint8)
    assert driver.apart(picture + 1, picture)["psnr"] == pytest.approx(48.13, abs=0.01)
    assert driver.apart(picture, picture[:, :4])["max_abs"] == float("inf")


# -- the gate -------------------------------------------------------------------------------------


def row(side: str, ratio: float | None, seconds: float = 1.0, failed: str = "") -> report.Row:
    return report.Row(
        "sd15-step-512",
        side,
        seconds,
        ratio,
        ratio,
        ratio,
        0.5,
        1.0,
        None,
        None,
        None,
        failed,
        True,
    )


@pytest.mark.parametrize(
    ("before", "now", "status"),
    [(1.5, 1.5, 0), (1.5, 1.36, 0), (1.5, 1.34, 1), (1.5, 2.0, 0), (1.5, None, 2)],
)
def test_ratios_may_not_fall(tmp_path: Path, before: float, now: float | None, status: int) -> None:
    """Seconds play no part: the machine now is ten times slower."""
    files = []
    for name, ratio, seconds in (("old", before, 1.0), ("new", now, 10.0)):
        rows = [row(OURS, None, seconds), row(EAGER, ratio, seconds)]
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"rows": [each._asdict() for each in rows]}))
    arguments = ["--result", str(files[1]), "--against", str(files[0]), "--tolerance", "0.1"]
    assert command.main(arguments) == status


def test_a_failure_of_ours_falls_too() -> None:
    old = [row(OURS, None), row(EAGER, 1.5)]
    worse, apart, compared = report.fallen([row(OURS, None, failed="boom")], old, 0.1)
    assert worse == ["sd15-step-512, safelight: fails now: boom"]
    assert (len(apart), compared) == (1, 0)


# -- the command ----------------------------------------------------------------------------------


def test_the_plan_measures_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_rate", lambda: 250e9)
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "openvino" else name)
    options = ["--plan", "--models", "tiny", "--budget", "2", "--cache", str(tmp_path)]
    assert command.main(options) == 0
    told = capsys.readouterr().out
    assert "tiny-step-128 " in told
    assert "minutes in all" in told
    assert "openvino: not installed" in told
    assert "Beyond the budget: " in told
    assert not any(tmp_path.iterdir())


def test_wrong_options_are_told() -> None:
    empty = ["--models", "tiny", "--kinds", "encode", "--budget", "0"]
    for options in (["--cases", "sd15-step-100"], ["--result", "x.json"], empty):
        with pytest.raises(SystemExit) as stopped:
            command.main(options)
        assert stopped.value.code == 2


def test_peers_at_micro_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every installed peer that needs no compiler, on the real road: the guided step of all agrees
    with diffusers; those that are not there say so."""
    peers = [EAGER, "openvino", "onnxruntime", "sd.cpp"]
    options = ["--smoke", "--force", "--cases", "micro-step-16", "--rounds", "1", "--threads", "1"]
    status = command.main([*options, "--cache", str(tmp_path), "--peers", *peers])
    told = capsys.readouterr().out
    assert status == 0
    (record,) = tmp_path.glob("run-*.jsonl")  # kept: one peer at least cannot do micro sizes
    (line,) = driver.read(record)
    for side in (OURS, EAGER, "openvino", "onnxruntime"):
        needs = command.NEEDS.get(side)
        if needs is not None and find_spec(needs) is None:
            assert f"not installed: {needs}" in told
            continue
        found = line["sides"][side]
        assert "failed" not in found, found
        assert found["peak_mib"] > 20
        if side != EAGER:
            assert found["relative"] < 1e-4


def test_a_step_inside_a_picture_waits_for_its_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """stable-diffusion.cpp gives no steps: its picture is held in the callback between them."""
    done: list[int] = []

    class Stub:
        def __init__(self, **options: Any) -> None:
            assert options["wtype"] == "f32"

        def generate_image(self, *, sample_steps: int, progress_callback: Any, **_: Any) -> None:
            progress_callback(3, 7, 0.1)  # tensors being loaded: no step
            for k in range(1, sample_steps + 1):
                time.sleep(0.02)
                done.append(k)
                progress_callback(k, sample_steps, 0.02)

    monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", SimpleNamespace(StableDiffusion=Stub))
    monkeypatch.setattr(cpp.weights, "single_file", lambda *_: tmp_path / "one.safetensors")
    side = cpp.Plain("sd15", tmp_path, 1)
    case = Case("sd15", "step", 64)
    side.load(case)
    side.prepare(case)
    for k in (1, 2, 3):
        assert 0.02 <= side.run(k == 1) < 2
        time.sleep(0.05)
        assert done == list(range(1, k + 1))
    for wrong in (
        Case("tiny", "step", 128),
        Case("sd15", "encode", 64),
        Case("sd15", "step", 64, 4),
    ):
        with pytest.raises(ValueError, match=r"published|alone|one after"):
            cpp.Plain(wrong.model, tmp_path, 1).export(wrong)


# -- drawings -------------------------------------------------------------------------------------


def test_drawings_and_the_page(tmp_path: Path) -> None:
    rows = [row(OURS, None), row(EAGER, 1.5), row("openvino", None, failed="not installed")]
    file = tmp_path / "compare-chip-2-cores-2026-01-02.json"
    facts = {"Processor": "chip, 2 cores", "torch": "2"}
    file.write_text(json.dumps({"rows": [each._asdict() for each in rows], "machine": facts}))
    (tmp_path / "compare-chip-2-cores-2026-01-01.json").write_text("{}")
    assert plots.newest(tmp_path) == [file]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{plots.BEGIN}\nyesterday\n{plots.END}\nafter\n")
    plots.replace_section(page, "\n".join(plots.section(file, tmp_path / "assets")))
    text = page.read_text()
    assert "yesterday" not in text
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "#### SD 1.5" in text
    assert "not installed" in text
    (drawing,) = (tmp_path / "assets").glob("*.svg")
    assert "1.50" in drawing.read_text() or drawing.stat().st_size > 5000
    assert drawing.name in text


def test_the_page_has_its_marks() -> None:
    text = plots.PAGE.read_text(encoding="utf-8")
    assert text.index(plots.BEGIN) < text.index(plots.END)


def test_the_peak_is_counted_anew() -> None:
    held = np.ones(2**24)  # 128 MiB
    del held
    worker._forget_peak()
    before = worker._peak()
    held = np.ones(2**23)  # 64 MiB
    assert 50 < worker._peak() - before < 90, held.shape
