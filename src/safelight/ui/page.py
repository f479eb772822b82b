"""The page: what happens when its controls are used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gradio as gr

from safelight import __version__
from safelight.errors import SafelightError
from safelight.ui import form, views
from safelight.ui.desk import Kept
from safelight.ui.layout import QUIET, Layout
from safelight.ui.run import refusal


class Page(Layout):
    """The page of a desk; arguments as :class:`~safelight.ui.layout.Layout`."""

    def build(self) -> gr.Blocks:
        """All of it."""
        with gr.Blocks(
            title="Safelight", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True
        ) as blocks:
            gr.HTML(views.header(self.desk.capabilities, self.where))
            with gr.Tabs(elem_id="sl-nav") as nav:
                with gr.Tab("Create", id="create", elem_id="sl-create"):
                    self._create()
                with gr.Tab("History", id="history", elem_id="sl-history"):
                    self._history()
                with gr.Tab("About", id="about", elem_id="sl-about"):
                    self._about()
            gr.HTML(views.footer(__version__))
            self.parts["nav"] = nav
            self._connect(blocks)
        return blocks

    # -- what happens --------------------------------------------------------------------------

    def _connect(self, blocks: gr.Blocks) -> None:
        parts, inputs = self.parts, list(self.inputs.values())
        making = [parts[n] for n in ("stage", "gallery", "next", "folded", "details", "record")]
        making += [parts[n] for n in ("go", "stop", "past")]
        gr.on(
            [parts["go"].click, self.controls["prompt"].submit],
            self.make,
            [parts["mode"], *inputs],
            making,
            concurrency_limit=None,
            trigger_mode="once",
            **QUIET,
        ).then(self._about_outputs, [self.controls["model"]], self._about_parts(), **QUIET)
        parts["stop"].click(self.cancel, None, None, queue=False, **QUIET)
        parts["gallery"].select(self.choose, None, [parts["details"], parts["record"]], **QUIET)
        self.controls["model"].input(
            self.choose_model,
            [self.controls["model"]],
            [*self._about_parts(), *(self.controls[n] for n in DEFAULTED)],
            **QUIET,
        )
        self._connect_pictures()
        self._connect_settings()
        blocks.load(self._about_outputs, [self.controls["model"]], self._about_parts(), **QUIET)
        blocks.unload(self.leave)

    def _connect_pictures(self) -> None:
        """Results that become what another mode starts from."""
        parts, made = self.parts, self.controls
        for mode, target in (
            ("image", "image"),
            ("inpaint", "drawing"),
            ("vary", "look"),
            ("upscale", "small"),
        ):
            parts[f"to_{mode}"].click(
                _sender(self, mode), None, [made[target], parts["modes"], parts["mode"]], **QUIET
            )

    def _connect_settings(self) -> None:
        parts = self.parts
        filling = [*self.inputs.values(), *(parts[n] for n in ("nav", "modes", "mode", "stage"))]
        for button, fill in (
            ("reuse", self.reuse),
            ("past_use", self.past_use),
            ("dropped_use", self.dropped_use),
        ):
            parts[button].click(fill, None, filling, **QUIET).then(
                self._about_outputs, [self.controls["model"]], self._about_parts(), **QUIET
            )
        shown = [parts["past_details"], parts["past_record"]]
        parts["past"].select(self.look_up, None, shown, **QUIET)
        parts["past_clear"].click(self.clear, None, [parts["past"], *shown], **QUIET)
        parts["dropped"].upload(
            self.drop, [parts["dropped"]], [*shown, parts["dropped_use"]], **QUIET
        )
        parts["dropped"].clear(
            lambda: gr.update(interactive=False), None, parts["dropped_use"], **QUIET
        )

    def make(self, request: gr.Request, mode: str, *values: Any) -> Iterator[list[Any]]:
        """Generate: yields what the page shows, until it is done."""
        session = self.desk.session(request.session_hash)
        given = dict(zip(self.inputs, values, strict=True))
        skip = gr.skip()
        if session.stop is not None:  # Enter, while it runs
            yield [skip] * 9
            return
        hidden = gr.update(visible=False)
        busy = [gr.update(interactive=False), gr.update(interactive=True), skip]
        rest = [gr.update(interactive=True), gr.update(interactive=False)]
        yield [views.idle("Asking …"), hidden, hidden, hidden, skip, skip, *busy]
        try:
            for seen in self.desk.make(session, mode, given):
                if not seen.final:
                    yield [views.stage(seen), skip, skip, skip, skip, skip, skip, skip, skip]
                    continue
                there = bool(session.shown)
                yield [
                    views.stage(seen),
                    gr.update(
                        value=_gallery(session.shown),
                        visible=there,
                        columns=4 if mode == "grid" else min(2, len(session.shown)),
                        elem_classes=["sl-sheet"] if mode == "grid" else [],
                    ),
                    gr.update(visible=there),
                    gr.update(visible=there),
                    *(_shown(session.shown[0]) if there else ("", "")),
                    *rest,
                    _gallery(session.history),
                ]
        except SafelightError as error:
            shown = views.refused(*refusal(error))
            yield [shown, hidden, hidden, hidden, skip, skip, *rest, skip]

    def cancel(self, request: gr.Request) -> None:
        """Stop this visitor's run."""
        stop = self.desk.session(request.session_hash).stop
        if stop is not None:
            stop.set()

    def leave(self, request: gr.Request) -> None:
        """The visitor has closed the page."""
        self.desk.leave(request.session_hash)

    def choose(self, request: gr.Request, event: gr.SelectData) -> tuple[str, str]:
        """Another of the pictures on show."""
        session = self.desk.session(request.session_hash)
        session.chosen = int(event.index)
        return _shown(session.shown[session.chosen])

    def look_up(self, request: gr.Request, event: gr.SelectData) -> tuple[str, str]:
        """One of the history."""
        session = self.desk.session(request.session_hash)
        session.looked_up = int(event.index)
        return _shown(session.history[session.looked_up])

    def clear(self, request: gr.Request) -> tuple[list[Any], str, str]:
        """Forget what was made."""
        session = self.desk.session(request.session_hash)
        session.history, session.looked_up = [], 0
        return [], "", ""

    def send(self, mode: str, name: str | None) -> list[Any]:
        """The chosen picture as what a mode starts from."""
        session = self.desk.session(name)
        if not session.shown:
            return [gr.skip(), gr.skip(), gr.skip()]
        path = str(session.shown[session.chosen].path)
        value: Any = path
        if mode == "inpaint":
            value = {"background": path, "layers": [], "composite": path}
        return [value, gr.Tabs(selected=mode), mode]

    # -- settings back -------------------------------------------------------------------------

    def reuse(self, request: gr.Request) -> list[Any]:
        """The settings of the picture on show."""
        session = self.desk.session(request.session_hash)
        return self._fill(session.shown[session.chosen : session.chosen + 1])

    def past_use(self, request: gr.Request) -> list[Any]:
        """The settings of a picture of the history."""
        session = self.desk.session(request.session_hash)
        return self._fill(session.history[session.looked_up : session.looked_up + 1])

    def dropped_use(self, request: gr.Request) -> list[Any]:
        """The settings of the picture that was dropped in."""
        read = self.desk.session(request.session_hash).read
        return self._nothing() if read is None else self.fill(read)

    def drop(self, request: gr.Request, path: str) -> tuple[str, str, Any]:
        """Read a picture's settings."""
        session = self.desk.session(request.session_hash)
        try:
            read = self.desk.drop(session, path)
        except SafelightError as error:
            return views.refused(*refusal(error)), "", gr.update(interactive=False)
        assert session.dropped is not None
        html, record = _shown(session.dropped)
        return html + views.listed(read.notes), record, gr.update(interactive=True)

    def _fill(self, kept: list[Kept]) -> list[Any]:
        if not kept:
            return self._nothing("There is nothing to take settings from yet.")
        try:
            return self.fill(self.desk.settings(kept[0]))
        except SafelightError as error:
            found = self._nothing()
            found[-1] = views.refused(*refusal(error))
            return found

    def _nothing(self, why: str = "") -> list[Any]:
        return [gr.skip()] * (len(self.inputs) + 3) + [views.idle(why) if why else gr.skip()]

    def fill(self, filled: form.Filled) -> list[Any]:
        """Settings into the controls; the page turns to their tab."""
        found: list[Any] = []
        for name, control in self.inputs.items():
            if name not in filled.values:
                found.append(gr.skip())
                continue
            found.append(_holding(control, filled.values[name]))
        said = views.idle("These settings are in the form now.") + views.listed(filled.notes)
        return [
            *found,
            gr.Tabs(selected="create"),
            gr.Tabs(selected=filled.mode),
            filled.mode,
            said,
        ]

    # -- models --------------------------------------------------------------------------------

    def choose_model(self, name: str) -> list[Any]:
        """Another model: its defaults, and what it cannot do."""
        try:
            model = self.desk.model(name, load=True)
        except SafelightError as error:
            about = views.refused(*refusal(error))
            return [about, *[gr.skip()] * (len(self._about_parts()) - 1 + len(DEFAULTED))]
        values = {
            "steps": model.get("steps"),
            "guidance_scale": model.get("guidance_scale"),
            "width": model.get("native_size"),
            "height": model.get("native_size"),
            "vary_noise": model.get("noise_level") or 0,
        }
        return [
            *self._about_outputs(name),
            *(
                gr.skip() if values[n] is None else _holding(self.controls[n], values[n])
                for n in DEFAULTED
            ),
        ]

    def _about_parts(self) -> list[Any]:
        return [
            self.parts["about"],
            self.parts["card"],
            self.controls["_depth"],
            self.controls["_prior"],
            *self.notes.values(),
        ]

    def _about_outputs(self, name: str) -> list[Any]:
        self.desk.refresh()
        model = self.desk.model(name)
        notes = [self._cannot(mode, model) for mode in self.notes]
        return [
            views.about_model(model),
            self._card(name),
            gr.update(visible=bool(model.get("depth"))),
            gr.update(visible=bool(model.get("prior"))),
            *(gr.update(value=note, visible=bool(note)) for note in notes),
        ]


DEFAULTED = ("steps", "guidance_scale", "width", "height", "vary_noise")
"""Controls that a model has defaults for."""


def _holding(control: Any, value: Any) -> Any:
    """A control with another value; a slider is made long enough for it."""
    if not isinstance(control, gr.Slider) or value is None:
        return gr.update(value=value)
    low, high = min(control.minimum, value), max(control.maximum, value)
    return gr.update(value=value, minimum=low, maximum=high)


def _sender(page: Page, mode: str) -> Any:
    def send(request: gr.Request) -> list[Any]:
        return page.send(mode, request.session_hash)

    return send


def _gallery(kept: list[Kept]) -> list[tuple[str, str]]:
    return [(str(each.path), each.caption) for each in kept]


def _shown(kept: Kept) -> tuple[str, str]:
    record = json.dumps(kept.record, indent=2, ensure_ascii=False) if kept.record else ""
    return views.details(kept.record, kept.parameters), record
