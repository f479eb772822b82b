"""Where the page's parts stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from safelight import cards
from safelight.ui import controls as ctl
from safelight.ui import form, views
from safelight.ui.desk import Desk

CSS = Path(__file__).parent / "page.css"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

HEAD = """
<meta name="referrer" content="no-referrer">
<script>
  // The footer's links open the tab that holds what they promise.
  const showAbout = () => {
    const name = location.hash.slice(1);
    if (!["model-card", "responsible-use", "limits"].includes(name)) return;
    document.querySelector("#sl-about-button")?.click();
    setTimeout(() => document.querySelector(`#sl-${name}`)?.scrollIntoView(), 400);
    history.replaceState(null, "", location.pathname + location.search);
  };
  addEventListener("hashchange", showAbout);
  addEventListener("load", () => setTimeout(showAbout, 1500));
</script>
"""


def theme() -> gr.themes.Base:
    """Warm greys and a lamp's red; letters that come with gradio."""
    # Of the weights that come with gradio only these two have all letters.
    fonts = [gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"]
    return gr.themes.Base(
        primary_hue=gr.themes.colors.red,
        neutral_hue=gr.themes.colors.stone,
        font=fonts,
        font_mono=[gr.themes.LocalFont("IBM Plex Mono"), "monospace"],
        radius_size=gr.themes.sizes.radius_md,
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        input_placeholder_color="*neutral_500",
        button_cancel_background_fill="*neutral_100",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_text_color="white",
        block_label_text_weight="500",
        block_title_text_weight="500",
    )


class Layout:
    """The controls and outputs of a desk's page, still without a life.

    Args:
        where: what the server is called in the page's head.
    """

    def __init__(self, desk: Desk, where: str = "on this machine") -> None:
        self.desk, self.where = desk, where
        self.controls: dict[str, Any] = {}
        self.parts: dict[str, Any] = {}
        self.notes: dict[str, gr.HTML] = {}

    @property
    def inputs(self) -> dict[str, Any]:
        """The controls whose values make a request."""
        return {name: each for name, each in self.controls.items() if name[0] != "_"}

    # -- where things stand --------------------------------------------------------------------

    def _create(self) -> None:
        first = self.desk.model(self.desk.models[0])
        made, parts = self.controls, self.parts
        with gr.Column(elem_id="sl-desk"):
            with gr.Column(elem_id="sl-ask"):
                ctl.words(made, self.desk.capabilities)
                parts["about"] = gr.HTML(views.about_model(first), elem_id="sl-model-about")
                ctl.prompts(made)
                parts["mode"] = gr.State("text")
                with gr.Tabs(selected="text", elem_id="sl-modes") as modes:
                    for mode, label in form.TABS.items():
                        with gr.Tab(label, id=mode, elem_id=f"sl-mode-{mode}") as tab:
                            note = self._cannot(mode, first)
                            self.notes[mode] = gr.HTML(note, visible=bool(note))
                            ctl.MODES[mode](made)
                        tab.select(lambda mode=mode: mode, None, parts["mode"], **QUIET)
                parts["modes"] = modes
                with gr.Row(elem_id="sl-go"):
                    parts["go"] = gr.Button("Generate", variant="primary", elem_id="sl-generate")
                    parts["stop"] = gr.Button(
                        "Cancel", variant="stop", interactive=False, elem_id="sl-cancel"
                    )
            self._out()
            with gr.Column(elem_id="sl-settings"):
                ctl.settings(made, first, self.desk.capabilities["limits"])
                with gr.Accordion("LoRA and textual inversion", open=False):
                    ctl.adapters(made, self.desk.capabilities)
                with gr.Accordion("Advanced", open=False):
                    ctl.advanced(made, self.desk.capabilities)

    def _out(self) -> None:
        parts = self.parts
        with gr.Column(elem_id="sl-out"):
            parts["stage"] = gr.HTML(views.idle(), elem_id="sl-stage")
            parts["gallery"] = gr.Gallery(
                label="Pictures",
                columns=2,
                height="auto",
                object_fit="contain",
                preview=False,
                visible=False,
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="sl-gallery",
            )
            with gr.Row(visible=False, elem_id="sl-next") as parts["next"]:
                parts["reuse"] = gr.Button("Use these settings", size="sm", elem_id="sl-reuse")
                parts["to_image"] = gr.Button("To image to image", size="sm")
                parts["to_inpaint"] = gr.Button("To inpaint", size="sm")
                parts["to_vary"] = gr.Button("To variations", size="sm")
                parts["to_upscale"] = gr.Button("To upscale", size="sm")
            with gr.Accordion("Settings of this picture", open=False, visible=False) as folded:
                parts["details"] = gr.HTML()
                with gr.Accordion("Everything, as JSON", open=False):
                    parts["record"] = gr.Code(language="json", label="Metadata", lines=8)
            parts["folded"] = folded

    def _history(self) -> None:
        parts = self.parts
        with gr.Row(elem_id="sl-past"):
            with gr.Column(scale=3):
                parts["past"] = gr.Gallery(
                    label="Made on this visit, newest first",
                    columns=4,
                    height="auto",
                    object_fit="contain",
                    preview=False,
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="sl-past-gallery",
                )
                with gr.Row():
                    parts["past_use"] = gr.Button("Use these settings", elem_id="sl-past-use")
                    parts["past_clear"] = gr.Button("Clear the history")
                gr.Markdown(
                    "Pictures stay here until you leave the page, and nobody else sees them. "
                    "Each file carries its settings: drop it on this page to have them back.",
                    elem_classes="sl-hint",
                )
            with gr.Column(scale=2):
                parts["dropped"] = gr.Image(
                    label="Read a picture: made here, or by AUTOMATIC1111",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=220,
                    elem_id="sl-dropped",
                )
                parts["dropped_use"] = gr.Button(
                    "Use this picture’s settings", interactive=False, elem_id="sl-dropped-use"
                )
                parts["past_details"] = gr.HTML(elem_id="sl-past-details")
                with gr.Accordion("Everything, as JSON", open=False):
                    parts["past_record"] = gr.Code(language="json", label="Metadata", lines=8)

    def _about(self) -> None:
        limits = self.desk.capabilities["limits"]
        with gr.Column(elem_id="sl-model-card", elem_classes="sl-prose"):
            self.parts["card"] = gr.Markdown(self._card(self.desk.models[0]))
        with (
            gr.Column(elem_id="sl-responsible-use", elem_classes="sl-prose"),
            gr.Accordion("Responsible use: licences, uses and limits of the published models"),
        ):
            gr.Markdown(_responsible())
        with gr.Column(elem_id="sl-limits", elem_classes="sl-prose"):
            gr.Markdown(
                "## This server\n\n"
                f"- Models: {', '.join(self.desk.models)}\n"
                f"- At most {limits['max_count']} pictures a request, {limits['max_steps']} steps, "
                f"{limits['max_pixels']:,} pixels, {limits['max_prompt']:,} characters of prompt\n"
                f"- At most {limits['queue_seconds']:.0f} seconds of work may wait\n"
                "- Requests share steps; the picture of a seed is the same whatever its company\n"
                "- Pictures are marked as machine-made and carry their settings\n"
                "- This page loads nothing from other machines and counts nobody\n"
            )

    def _cannot(self, mode: str, model: Any) -> str:
        return views.cannot(mode, model, self.desk.able(mode))

    def _card(self, name: str) -> str:
        card = self.desk.model(name).get("card")
        return card or f"# {name}\n\nThis model came without a card that Safelight knows."


def _responsible() -> str:
    """The page of all cards, without what only its readers in the documentation can use."""
    parts = cards.page().split("\n\n")
    return "\n\n".join(
        part for part in parts if not part.startswith(("*Written by", "# ")) and ".md" not in part
    )
