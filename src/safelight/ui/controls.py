"""The page's controls, by the names that :mod:`safelight.ui.form` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from safelight import names
from safelight.ui import axes, form

Controls = dict[str, Any]
OWN = "The model’s own"
POLICIES = [
    ("as the model’s card has it", ""),
    ("shown, with a note", "flag"),
    ("blurred", "blur"),
    ("black", "black"),
    ("removed", "reject"),
]
"""Switching the checker off is for who runs the server, not for who visits the page."""
WEIGHTS = [("plain", "none"), ("compel", "compel"), ("A1111", "a1111")]


def _picture(name: str, label: str | None = None, height: int = 240) -> gr.Image:
    return gr.Image(
        label=label or form.LABELS[name],
        type="filepath",
        image_mode=None,  # the file as it came: its digest is what the result's settings name
        sources=["upload", "clipboard"],
        height=height,
        elem_id=f"sl-{name.replace('_', '-')}",
    )


def _slider(
    name: str, low: float, high: float, value: float, step: float, **more: Any
) -> gr.Slider:
    label = more.pop("label", None) or form.LABELS[name]
    return gr.Slider(low, high, value, step=step, label=label, elem_id=f"sl-{name}", **more)


def words(made: Controls, capabilities: Mapping[str, Any]) -> None:
    """Which model, and what is to be seen."""
    models = list(capabilities["models"])
    made["model"] = gr.Dropdown(models, value=models[0], label="Model", elem_id="sl-model")


def prompts(made: Controls) -> None:
    """What is to be seen, and what is not."""
    made["prompt"] = gr.Textbox(
        label="Prompt",
        value="",
        placeholder="a red cube on top of a blue sphere",
        lines=1,  # with more, Enter would not submit
        max_lines=6,
        elem_id="sl-prompt",
        submit_btn=False,
    )
    made["negative_prompt"] = gr.Textbox(
        label="Negative prompt",
        placeholder="what should not be in it",
        lines=1,
        max_lines=4,
        elem_id="sl-negative",
    )


def settings(made: Controls, model: Mapping[str, Any], limits: Mapping[str, Any]) -> None:
    """What every mode has."""
    size = int(model.get("native_size") or 512)
    with gr.Row():
        made["count"] = _slider("count", 1, max(2, min(4, int(limits["max_count"]))), 1, 1)
        made["steps"] = _slider(
            "steps", 1, min(512, int(limits["max_steps"])), model.get("steps") or 25, 1
        )
    with gr.Row():
        made["guidance_scale"] = _slider(
            "guidance_scale", 1, 20, model.get("guidance_scale") or 7.5, 0.1
        )
        made["seed"] = gr.Textbox(
            label="Seed", placeholder="empty: a new one each time", elem_id="sl-seed", max_lines=1
        )
    with gr.Row(equal_height=True):
        made["size"] = gr.Radio(
            [form.AUTO, form.CUSTOM],
            value=form.AUTO,
            label="Size",
            info="Automatic: the model’s own, or that of the picture it starts from",
            elem_id="sl-size",
        )
        made["weighting"] = gr.Radio(
            WEIGHTS,
            value="none",
            label="Prompt weights",
            info="How (words:1.3) and word+ in a prompt are read",
            elem_id="sl-weighting",
        )
    with gr.Row(visible=False) as row:
        step = int(model.get("multiple") or 8)
        made["width"] = _slider("width", step, max(1024, size), size, step)
        made["height"] = _slider("height", step, max(1024, size), size, step)
    made["size"].change(
        lambda choice: gr.update(visible=choice == form.CUSTOM),
        made["size"],
        row,
        show_progress="hidden",
        api_visibility="private",
    )


def adapters(made: Controls, capabilities: Mapping[str, Any]) -> None:
    """LoRAs and textual inversions that the server has."""
    loras = [("none", ""), *((name, name) for name in capabilities.get("loras", ()))]
    if len(loras) == 1:
        gr.Markdown("This server has no LoRAs: start it with `--lora-dir FOLDER`.")
    for name in ("lora", "lora_2"):
        with gr.Row():
            made[name] = gr.Dropdown(loras, value="", label=form.LABELS[name], elem_id=f"sl-{name}")
            made[f"{name}_scale"] = _slider(f"{name}_scale", -2, 2, 1, 0.05)
    made["embeddings"] = gr.Dropdown(
        list(capabilities.get("embeddings", ())),
        value=[],
        multiselect=True,
        label=form.LABELS["embeddings"],
        info="Words of their own that the prompt may then use",
        elem_id="sl-embeddings",
    )


def advanced(made: Controls, capabilities: Mapping[str, Any]) -> None:
    """For who knows what they do."""
    samplers = [(names.sampler_label(name), name) for name in capabilities["samplers"]]
    schedules = [(names.schedule_label(name), name) for name in capabilities["schedules"]]
    with gr.Row():
        made["sampler"] = gr.Dropdown(
            [(OWN, ""), *samplers], value="", label="Sampler", elem_id="sl-sampler"
        )
        made["schedule"] = gr.Dropdown(
            [(OWN, ""), *schedules], value="", label="Schedule", elem_id="sl-schedule"
        )
    with gr.Row():
        made["guidance_rescale"] = _slider("guidance_rescale", 0, 1, 0, 0.05)
        made["clip_skip"] = _slider("clip_skip", 0, 11, 0, 1)
    with gr.Row():
        made["eta"] = gr.Number(
            label="Eta",
            value=None,
            minimum=0,
            maximum=1,
            step=0.05,
            info="Fresh noise a step, of DDIM and Euler a; empty: the sampler’s own",
            elem_id="sl-eta",
        )
        made["preview_every"] = _slider("preview_every", 0, 50, 3, 1, info="0: no previews")
    made["safety"] = gr.Dropdown(
        POLICIES, value="", label=form.LABELS["safety"], elem_id="sl-safety"
    )
    with gr.Row(visible=False, elem_id="sl-prior") as row:
        made["prior_steps"] = gr.Number(
            label="Prior steps", value=None, minimum=1, precision=0, info="Empty: the card’s"
        )
        made["prior_guidance_scale"] = gr.Number(
            label="Prior guidance", value=None, minimum=0, info="Empty: the card’s"
        )
    made["_prior"] = row


# -- what a mode starts from -----------------------------------------------------------------------


def image(made: Controls) -> None:
    """Image to image."""
    made["image"] = _picture("image", "Picture to start from")
    made["image_strength"] = gr.Slider(
        0,
        1,
        0.8,
        step=0.01,
        label="Strength",
        info="How much is made anew: 0 gives the picture back, 1 ignores it",
        elem_id="sl-image-strength",
    )
    with gr.Column(visible=False) as extra:
        made["depth"] = _picture("depth", "Depth map (else estimated from the picture)", 200)
    made["_depth"] = extra


def inpaint(made: Controls) -> None:
    """A picture, and a brush on it."""
    made["drawing"] = gr.ImageEditor(
        label="Picture, painted over where it is to be made anew",
        type="pil",
        image_mode="RGBA",
        sources=["upload", "clipboard"],
        brush=gr.Brush(default_size=10, colors=[("#e5484d", 0.65)], color_mode="fixed"),
        eraser=gr.Eraser(default_size=10),
        layers=False,
        transforms=(),
        height=420,
        canvas_size=(512, 512),
        elem_id="sl-drawing",
    )
    made["inpaint_strength"] = gr.Slider(
        0,
        1,
        1.0,
        step=0.01,
        label="Strength",
        info="1 forgets what was under the mask",
        elem_id="sl-inpaint-strength",
    )
    with gr.Accordion("Mask", open=False):
        made["mask"] = _picture(
            "mask", "A mask’s file, instead of painting: white is made anew", 160
        )
        made["mask_feather"] = _slider("mask_feather", 0, 64, 0, 1, info="Pixels")
        made["mask_around"] = gr.Checkbox(
            label="Work on the mask’s surroundings alone, larger", value=False
        )
        made["mask_crop"] = gr.Slider(0, 256, 32, step=1, label="Pixels around the mask")


def vary(made: Controls) -> None:
    """Pictures like other pictures."""
    with gr.Row():
        made["look"] = _picture("look", "Make others like this", 220)
        made["look_2"] = _picture("look_2", "Mixed with (optional)", 220)
    made["look_share"] = gr.Slider(
        0, 1, 0.5, step=0.05, label="Share of the second", elem_id="sl-look-share"
    )
    made["vary_noise"] = gr.Slider(
        0,
        999,
        0,
        step=1,
        label="Noise level",
        info="How freely the picture is read: 0 stays near, 999 hardly looks (unCLIP)",
        elem_id="sl-vary-noise",
    )


def upscale(made: Controls) -> None:
    """Four times as large a side."""
    made["small"] = _picture("small", "Picture to enlarge")
    made["upscale_noise"] = gr.Slider(
        0,
        350,
        20,
        step=1,
        label="Noise level",
        info="How much of the picture’s own grain is made anew",
        elem_id="sl-upscale-noise",
    )


def grid(made: Controls) -> None:
    """One picture for each value of up to three settings."""
    made["grid_of"] = gr.Radio(
        [(label, mode) for mode, label in form.MODES.items() if mode != "grid"],
        value="text",
        label="A grid of",
        info="With the pictures and settings of that tab",
        elem_id="sl-grid-of",
    )
    for x in "xyz":
        with gr.Row():
            made[f"{x}_axis"] = gr.Dropdown(
                [axes.NOTHING, *axes.KINDS],
                value={"x": "Seed", "y": "CFG scale"}.get(x, axes.NOTHING),
                label=f"{x.upper()} axis",
                elem_id=f"sl-{x}-axis",
                min_width=120,
                scale=2,
            )
            made[f"{x}_values"] = gr.Textbox(
                label=f"{x.upper()} values",
                value={"x": "1-3", "y": "1, 3, 6"}.get(x, ""),
                placeholder="1, 2, 3 · 1-5 · 1-10 (+3) · 1-9 [5]",
                elem_id=f"sl-{x}-values",
                min_width=140,
                scale=3,
            )
        made[f"{x}_axis"].input(
            lambda kind: gr.update(
                value="", placeholder="" if kind == axes.NOTHING else axes.KINDS[kind].hint
            ),
            made[f"{x}_axis"],
            made[f"{x}_values"],
            show_progress="hidden",
            api_visibility="private",
        )
    gr.Markdown(
        "Values as in AUTOMATIC1111: `1, 2, 3`, ranges `1-5 (+2)`, counts `1-5 [3]`; for prompt "
        "S/R the first is what is replaced. Without any axis: a sheet of **Pictures** seeds.",
        elem_classes="sl-hint",
    )


MODES = {
    "text": lambda made: gr.Markdown(
        "From words alone. **Enter** generates, **Shift+Enter** begins a new line.",
        elem_classes="sl-hint",
    ),
    "image": image,
    "inpaint": inpaint,
    "vary": vary,
    "upscale": upscale,
    "grid": grid,
}
