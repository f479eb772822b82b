"""The page without a browser: its controls, and what happens when they are used."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from fake_server import FakeClient, detail, png
from safelight.errors import InvalidRequest, MissingExtra
from safelight.ui import form
from safelight.ui.desk import Desk
from safelight.ui.page import Page

VISITOR: Any = SimpleNamespace(session_hash="ada")
ALL = ("toy", "sd-v1"), ("looker", "unclip"), ("big", "x4-upscaler"), ("deep", "depth")


def page(*models: dict[str, Any], **limits: Any) -> Page:
    made = Page(Desk(FakeClient(*models, **limits)))
    made.build()
    return made


def values(made: Page, **changes: Any) -> list[Any]:
    """What the form sends, as it stands."""
    given = {name: control.value for name, control in made.inputs.items()}
    given["drawing"] = None
    unknown = set(changes) - set(given)
    assert not unknown
    return list({**given, "prompt": "a red cube", **changes}.values())


def run(made: Page, mode: str = "text", **changes: Any) -> list[list[Any]]:
    return list(made.make(VISITOR, mode, *values(made, **changes)))


def fake(made: Page) -> FakeClient:
    assert isinstance(made.desk.client, FakeClient)
    return made.desk.client


def test_every_control_has_a_label() -> None:
    blocks = Page(Desk(FakeClient(*(detail(*each) for each in ALL)))).build()
    kinds = (gr.Textbox, gr.Slider, gr.Dropdown, gr.Radio, gr.Checkbox, gr.Number, gr.Image)
    kinds += (gr.ImageEditor, gr.Gallery, gr.Code)
    controls = [each for each in blocks.blocks.values() if isinstance(each, kinds)]
    assert len(controls) > 40
    assert [each for each in controls if not each.label] == []


def test_the_form_of_card_002_is_there() -> None:
    made = page().inputs
    for name in ("prompt", "negative_prompt", "image", "count", "steps", "guidance_scale"):
        assert name in made
    for name in ("image_strength", "width", "height", "seed", "weighting", "lora", "lora_scale"):
        assert name in made
    count, steps, guidance = made["count"], made["steps"], made["guidance_scale"]
    assert (count.minimum, count.maximum, count.value) == (1, 4, 1)
    assert (steps.minimum, steps.maximum) == (1, 512)
    assert (guidance.minimum, guidance.maximum) == (1, 20)
    assert "compel" in [value for _, value in made["weighting"].choices]


def test_a_picture_is_made_shown_and_kept() -> None:
    made = page()
    told = run(made, count=2, seed="9", steps=4)
    assert "Asking" in told[0][0]
    assert any("Step 1 of 4" in each[0] for each in told)
    stage, gallery, *_ = told[-1]
    assert "2 pictures" in stage
    assert [caption for _, caption in gallery["value"]] == ["seed 9", "seed 10"]
    path = Path(gallery["value"][0][0])
    assert path.name.startswith("a-red-cube-9-")
    assert Image.open(path).text["parameters"].startswith("a red cube")  # type: ignore[attr-defined]
    assert fake(made).bodies[0]["preview_every"] == 3
    assert [path for path, _ in told[-1][-1]] == [path for path, _ in gallery["value"]]


def test_a_refusal_names_the_field_as_the_page_calls_it() -> None:
    made = page()
    last = run(made, seed="seven")[-1]
    assert "<b>Seed</b>" in last[0]
    assert 'role="alert"' in last[0]
    assert last[6]["interactive"] is True
    fake(made).refuse = InvalidRequest("lora_scale", "is absurd.")
    assert "<b>LoRA scale</b> is absurd." in run(made)[-1][0]
    fake(made).refuse = None
    assert "1 picture" in run(made)[-1][0]


def test_cancel_stops_the_run_of_its_own_visitor() -> None:
    made = page()
    running = made.make(VISITOR, "text", *values(made))
    next(running)
    next(running)
    made.cancel(SimpleNamespace(session_hash="bob"))  # type: ignore[arg-type]
    assert fake(made).cancelled == []
    made.cancel(VISITOR)
    assert "Cancelled" in list(running)[-1][0]
    assert fake(made).cancelled == ["job-0"]


def test_a_second_run_waits_for_the_first() -> None:
    made = page()
    running = made.make(VISITOR, "text", *values(made))
    next(running)
    next(running)
    assert len(run(made)) == 1
    running.close()
    assert len(fake(made).bodies) == 1


def test_who_leaves_takes_everything_along() -> None:
    made = page()
    run(made)
    folder = made.desk.session("ada").folder
    assert list(folder.iterdir())
    made.leave(VISITOR)
    assert not folder.exists()
    assert made.desk.session("ada").history == []


def test_visitors_do_not_see_each_other() -> None:
    made = page()
    run(made)
    assert len(made.desk.session("ada").history) == 1
    assert made.desk.session("bob").history == []


@pytest.mark.parametrize(("name", "family"), ALL)
def test_a_model_that_cannot_says_what_can(name: str, family: str) -> None:
    made = page(detail(name, family), *(detail(*each) for each in ALL if each[0] != name))
    mine = detail(name, family)["modes"]
    for mode, note in made.notes.items():
        if mode in (*mine, "grid"):
            assert note.value == ""
        else:
            assert f"<b>{name}</b> cannot do" in note.value
            able = next(n for n, f in ALL if mode in detail(n, f)["modes"])
            assert f"<b>{able}</b>" in note.value


def test_with_no_model_for_it_the_page_says_how_to_get_one() -> None:
    assert "-m MODEL" in page().notes["upscale"].value


def test_choosing_a_model_brings_its_defaults() -> None:
    made = page(detail(), detail("looker", "unclip", steps=11, guidance_scale=8.0))
    found = made.choose_model("looker")
    assert [each["value"] for each in found[-5:]] == [11, 8.0, 32, 32, 0]
    assert "No safety checker" in found[0]
    assert found[1] == "# Card of looker"


def test_a_model_nobody_has_looked_at_is_loaded_when_it_is_chosen() -> None:
    unknown = {"name": "folder", "family": None, "loaded": False, "card": None}
    made = page(detail(), unknown)
    assert "not loaded yet" in made._about_outputs("folder")[0]
    assert "sd-v1" in made.choose_model("folder")[0]


def test_safety_is_shown() -> None:
    made = page(detail(checker=True))
    assert "Safety checker on" in made._about_outputs("toy")[0]
    fake(made).flag = True
    last = run(made)[-1]
    assert "flagged by the safety checker. It is black." in last[0]
    assert "flagged" in last[1]["value"][0][1]
    assert "checked; nearest concept a (+0.100), policy black" in last[4]
    assert "off" not in [value for _, value in made.inputs["safety"].choices]


# -- grids -----------------------------------------------------------------------------------------


def grid(made: Page, **changes: Any) -> list[Any]:
    nothing = {f"{x}_axis": "Nothing" for x in "xyz"} | {f"{x}_values": "" for x in "xyz"}
    return run(made, "grid", **{**nothing, **changes})[-1]


def test_a_grid_with_its_sheet() -> None:
    made = page()
    x = {"x_axis": "Steps", "x_values": "4-8 (+2)"}
    y = {"y_axis": "Prompt S/R", "y_values": "red, green"}
    last = grid(made, **x, **y, seed="3")
    assert "6 pictures" in last[0]
    shown = last[1]["value"]
    assert shown[0][1] == "the whole grid"
    assert len(shown) == 7
    sent = fake(made).bodies
    assert [body["steps"] for body in sent] == [4, 6, 8] * 2
    assert sent[3]["prompt"] == "a green cube"
    assert {body["seed"] for body in sent} == {3}
    sheet = Image.open(shown[0][0])
    assert sheet.width > 3 * 32
    assert sheet.getpixel((2, 2)) == (255, 255, 255)


def test_a_grid_without_a_seed_has_one_seed() -> None:
    made = page()
    grid(made, x_axis="Steps", x_values="4,5")
    assert len({body["seed"] for body in fake(made).bodies}) == 1


def test_a_grid_without_axes_is_a_sheet_of_seeds() -> None:
    made = page()
    grid(made, count=3, seed="7")
    assert [body["seed"] for body in fake(made).bodies] == [7, 8, 9]


def test_a_wrong_axis_is_named() -> None:
    last = grid(page(), x_axis="Steps", x_values="many")
    assert "<b>X values</b>" in last[0]


# -- settings back ---------------------------------------------------------------------------------


def filled(made: Page, found: list[Any]) -> dict[str, Any]:
    assert len(found) == len(made.inputs) + 4
    pairs = zip(made.inputs, found, strict=False)
    return {name: each["value"] for name, each in pairs if "value" in each}


def test_use_these_settings() -> None:
    made = page()
    run(made, seed="9", steps=6, guidance_scale=2.5, lora="style", lora_scale=0.5, sampler="ddim")
    found = filled(made, made.reuse(VISITOR))
    assert found["seed"] == "9"
    assert (found["steps"], found["guidance_scale"], found["sampler"]) == (6, 2.5, "ddim")
    assert (found["lora"], found["lora_scale"]) == ("style", 0.5)
    assert found["prompt"] == "a red cube"
    run(made, seed="9", **{k: v for k, v in found.items() if k != "seed"})
    first, second = fake(made).bodies
    assert {k: second[k] for k in ("seed", "steps", "prompt", "loras")} == {
        k: first[k] for k in ("seed", "steps", "prompt", "loras")
    }


def test_use_the_settings_of_history() -> None:
    made = page()
    run(made, seed="1")
    run(made, seed="2")
    event: Any = SimpleNamespace(index=1)
    html, record = made.look_up(VISITOR, event)
    assert "a red cube" in html
    assert '"seed": 1' in record
    assert filled(made, made.past_use(VISITOR))["seed"] == "1"
    made.clear(VISITOR)
    assert "nothing to take settings from" in made.past_use(VISITOR)[-1]


def test_a_dropped_picture_of_a1111_is_read(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    text = (
        "a (red:1.2) cube\nNegative prompt: fog\nSteps: 20, Sampler: Euler a, "
        "Schedule type: Karras, CFG scale: 25, Seed: 123, Size: 64x32, Model: other, Version: v1.10"
    )
    info = PngInfo()
    info.add_text("parameters", text)
    path = tmp_path / "theirs.png"
    Image.new("RGB", (64, 32)).save(path, pnginfo=info)
    made = page()
    html, record, button = made.drop(VISITOR, str(path))
    assert "a (red:1.2) cube" in html
    assert record == ""
    assert button["interactive"] is True
    found = filled(made, made.dropped_use(VISITOR))
    assert (found["prompt"], found["weighting"]) == ("a (red:1.2) cube", "a1111")
    assert (found["sampler"], found["schedule"], found["seed"]) == ("euler-a", "karras", "123")
    assert (found["size"], found["width"], found["height"]) == (form.CUSTOM, 64, 32)
    place = list(made.inputs).index("guidance_scale")
    assert made.dropped_use(VISITOR)[place]["maximum"] == 25  # a value is never cut to a slider


def test_a_picture_that_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(png())
    html, _, button = page().drop(VISITOR, str(path))
    assert "does not say how it was made" in html
    assert str(tmp_path) not in html
    assert button["interactive"] is False


@pytest.mark.parametrize("mode", ["image", "inpaint", "vary", "upscale"])
def test_a_result_becomes_what_another_mode_starts_from(mode: str) -> None:
    made = page()
    run(made)
    value, _, state = made.send(mode, "ada")
    path = value["background"] if mode == "inpaint" else value
    assert Path(path).is_file()
    assert state == mode


def test_responsible_use_is_on_the_page() -> None:
    from safelight.ui import layout

    text = layout._responsible()
    assert "## Licences" in text
    assert "Forbidden:" in text
    assert ".md" not in text
    assert "Written by" not in text


# -- around it -------------------------------------------------------------------------------------


def test_without_gradio_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from safelight.cli import ui

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtra, match=r"safelight\[ui\]"):
        ui.need()


def test_help_imports_no_gradio() -> None:
    code = (
        "import sys\nfrom safelight.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit('gradio' in sys.modules or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_no_threads_are_left() -> None:
    before = threading.active_count()
    run(page())
    assert threading.active_count() <= before
