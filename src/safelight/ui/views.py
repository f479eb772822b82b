"""What is seen while pictures are made and when they are there, as HTML. No gradio."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from safelight.ui import form
from safelight.ui.run import Seen, Shot

MARK = (
    '<svg class="mark" viewBox="0 0 32 32" aria-hidden="true"><path d="M9 4h14l5 15H4z"/>'
    '<circle cx="16" cy="24" r="5"/></svg>'
)


def header(capabilities: Mapping[str, Any], where: str) -> str:
    """The page's head."""
    count = len(capabilities.get("models", ()))
    models = "one model" if count == 1 else f"{count} models"
    return (
        f'<header class="sl-head">{MARK}<div><h1>Safelight</h1>'
        f"<p>Stable Diffusion under a darkroom lamp</p></div>"
        f'<p class="sl-where">{models} · {escape(where)}</p></header>'
    )


def footer(version: str) -> str:
    """Where to read on; the links open this page's own tab."""
    return (
        '<footer class="sl-foot"><nav aria-label="About">'
        '<a href="#model-card">This model’s card</a>'
        '<a href="#responsible-use">Responsible use</a>'
        '<a href="#limits">Limits</a></nav>'
        f"<p>Pictures are marked as machine-made. Safelight {escape(version)}; this page loads "
        "nothing from other machines.</p></footer>"
    )


def about_model(model: Mapping[str, Any]) -> str:
    """One line below the choice of a model: what it is, and whether its pictures are checked."""
    parts = []
    if model.get("family"):
        size = model["native_size"]
        parts.append(f"{escape(str(model['family']))}, {size} × {size}, {model['steps']} steps")
        able = [form.MODES[mode].lower() for mode in model.get("modes", ())]
        parts.append("can do " + (", ".join(able) or "nothing that this page offers"))
    else:
        parts.append("not loaded yet: it is when you first use it")
    checker = model.get("checker")
    if checker:
        safety = '<span class="sl-badge good">Safety checker on</span>'
    elif checker is None:
        safety = '<span class="sl-badge">Safety checker: known once it is loaded</span>'
    else:
        safety = (
            '<span class="sl-badge warn">No safety checker: nobody looks at its pictures</span>'
        )
    return f'<p class="sl-model">{" · ".join(parts)}</p>{safety}'


def cannot(mode: str, model: Mapping[str, Any], others: Sequence[str]) -> str:
    """Why a tab does nothing with this model; empty where it does."""
    modes = model.get("modes")
    if modes is None or mode in modes or mode == "grid":
        return ""
    name, what = escape(str(model["name"])), escape(form.MODES[mode].lower())
    if others:
        where = "Choose " + " or ".join(f"<b>{escape(other)}</b>" for other in others) + " above."
    else:
        where = "This server has none: start it with one (<code>-m MODEL</code>)."
    return (
        f'<div class="sl-note" role="note"><b>{name}</b> cannot do {what}: that needs '
        f"{escape(form.NEEDS[mode])}. {where}</div>"
    )


# -- the stage -------------------------------------------------------------------------------------


def idle(text: str = "Say what you want to see, and press Generate.") -> str:
    """Before anything was asked for."""
    return f'<div class="sl-stage idle"><div class="lamp"></div><p>{escape(text)}</p></div>'


def refused(field: str, message: str) -> str:
    """An error, with the field as the page calls it."""
    name = f"<b>{escape(form.label(field))}</b> " if field else ""
    return (
        f'<div class="sl-stage"><div class="sl-alert" role="alert">{name}{escape(message)}</div>'
        "</div>"
    )


def stage(seen: Seen) -> str:
    """How far it is."""
    if seen.status == "failed":
        field, _, message = seen.error.partition(": ")
        known = field in form.LABELS
        return refused(field if known else "", message if known else seen.error)
    if seen.final:
        return _ended(seen)
    share = round(100 * seen.progress)
    picture = ""
    if seen.preview:
        picture = f'<img class="preview" alt="The picture so far" src="{thumb(seen.preview)}">'
    else:
        picture = '<div class="lamp on"></div>'
    return (
        f'<div class="sl-stage">{picture}<div class="bar" role="progressbar" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{share}" aria-label="Progress">'
        f'<div style="width:{share}%"></div></div>'
        f'<p class="told" aria-live="off">{escape(words(seen))}</p></div>'
    )


def words(seen: Seen) -> str:
    """One line: queue, step, picture, time left."""
    if seen.status == "queued":
        ahead = seen.position
        text = "Next in the queue" if not ahead else f"{ahead} ahead in the queue"
        return text + (f" · about {duration(seen.eta)} to go" if seen.eta else "")
    parts = [f"Step {seen.step} of {seen.steps}" if seen.steps else "Starting"]
    if seen.total > 1:
        parts.append(f"{len(seen.shots)} of {seen.total} pictures done")
    if seen.eta is not None:
        parts.append(f"about {duration(seen.eta)} to go")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _ended(seen: Seen) -> str:
    good = [shot for shot in seen.shots if shot.data is not None]
    what = f"{len(good)} picture{'s' if len(good) != 1 else ''} in {duration(seen.seconds)}"
    if seen.status == "cancelled":
        what = "Cancelled" + (f"; {what}" if good else "")
    notes = [_note(shot, len(seen.shots)) for shot in seen.shots]
    listed = "".join(dict.fromkeys(note for note in notes if note))
    return (
        f'<div class="sl-stage done"><p class="told" role="status">{what}</p>'
        f"{f'<ul>{listed}</ul>' if listed else ''}</div>"
    )


def _note(shot: Shot, many: int) -> str:
    """What there is to tell of a picture, as list items."""
    who = f"<b>Seed {shot.seed}</b>: " if many > 1 else ""
    found = []
    if shot.outcome == "cancelled":
        pass
    elif shot.nsfw:
        why = escape(shot.message or "the safety checker flagged it.")
        found.append(f'<li class="flagged">{who}flagged by the safety checker. {why}</li>')
    elif shot.outcome not in ("ok",) or shot.message:
        found.append(f'<li class="bad">{who}{escape(shot.message or shot.outcome)}</li>')
    found += [f"<li>{escape(notice)}</li>" for notice in shot.notices]
    return "".join(found)


def listed(notes: Sequence[str]) -> str:
    """What else there is to know."""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="sl-notes">{items}</ul>' if items else ""


def thumb(data: bytes, side: int = 512, quality: int = 82) -> str:
    """A picture as a small data URL."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


# -- details ---------------------------------------------------------------------------------------


def details(record: Mapping[str, Any], parameters: str = "") -> str:
    """A picture's settings as a table."""
    if not record:
        return f"<pre>{escape(parameters)}</pre>" if parameters else ""
    request, model = record.get("request") or {}, record.get("model") or {}
    rows: list[tuple[str, str]] = [("Model", f"{model.get('name')} ({model.get('family')})")]
    skip = {"count", "preview_every", "strength_rule", "schema"}
    order = [*form.LABELS, *sorted(request)]
    for name, value in sorted(request.items(), key=lambda pair: order.index(pair[0])):
        if name in skip or value in (None, "", [], {}, 0, False, "none"):
            continue
        rows.append((form.label(name), _value(value)))
    rows.append(("Outcome", _outcome(record)))
    rows.append(("Made by", f"safelight {record.get('safelight')}"))
    if record.get("pixels"):
        rows.append(("Pixels (SHA-256)", str(record["pixels"])[:16] + "…"))
    cells = "".join(
        f'<tr><th scope="row">{escape(str(k))}</th><td>{escape(str(v))}</td></tr>' for k, v in rows
    )
    return f'<table class="sl-details"><tbody>{cells}</tbody></table>'


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(" ".join(map(str, v)) if isinstance(v, list) else str(v) for v in value)
    return str(value)


def _outcome(record: Mapping[str, Any]) -> str:
    said, safety = str(record.get("outcome")), record.get("safety")
    message = f" {record['message']}" if record.get("message") else ""
    if safety is None:
        return f"{said}{message}; no safety checker looked"
    if safety.get("policy") == "off":
        return f"{said}{message}; the safety checker was switched off"
    scores = [s for s in safety.get("scores", ()) if s.get("score") is not None]
    near = max(scores, key=lambda s: s["score"], default=None)
    margin = "" if near is None else f"; nearest concept {near['name']} ({near['score']:+.3f})"
    return f"{said}{message}; checked{margin}, policy {safety.get('policy')}"
