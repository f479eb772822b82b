"""``safelight info``: what a model or a picture is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from safelight import cards
from safelight.cli import naming, show


def command(
    subject: Annotated[
        str, typer.Argument(metavar="PICTURE|MODEL", help="A picture, or a model's name or path.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show a picture's settings, or a model's networks, sizes and schedule."""
    path = Path(subject)
    if path.suffix.lower() in naming.ENDINGS:
        found = _picture(path)
        text = _picture_words(found)
    else:
        found = describe(subject)
        text = _model_words(found)
    if as_json:
        show.document(found)
    else:
        typer.echo(text)


def _picture(path: Path) -> dict[str, Any]:
    from safelight import provenance

    found = provenance.read(path)
    return {
        "schema": 1,
        "picture": path,
        "request": json.loads(found.request.canonical()),
        "parameters": found.parameters,
        "record": dict(found.record),
        "notes": list(found.notes),
    }


def _picture_words(found: dict[str, Any]) -> str:
    record = found["record"]
    lines = [f"{k:18} {v}" for k, v in found["request"].items() if v not in (None, "", {})]
    if record:
        model, plan = record["model"], record["plan"]
        lines.append(f"{'model':18} {model['name']} {model['digest'][:10]} ({model['source']})")
        lines.append(f"{'made on':18} {plan['device']} {plan['dtype']}, torch {plan['torch']}")
        lines.append(f"{'outcome':18} {record['outcome']} {record['message']}".rstrip())
        lines += [f"{'note':18} {notice}" for notice in record["notices"]]
    lines += [f"{'note':18} {note}" for note in found["notes"]]
    return "\n".join(lines)


def describe(name: str) -> dict[str, Any]:
    """A model as a document: spec, digest, and what each network holds."""
    from safelight.model import Model

    model = Model.load(name, device="cpu")
    networks = {
        part: {
            "tensors": len(net.state_dict()),
            "parameters": sum(p.numel() for p in net.parameters()),
        }
        for part, net in model.networks.items()
    }
    return {
        "schema": 1,
        "name": model.spec.name,
        "family": model.spec.family,
        "source": model.source,
        "digest": model.digest,
        "native_size": model.spec.native_size,
        "networks": networks,
        "spec": model.spec.model_dump(mode="json"),
        "licence": None if model.card is None else licence(model.card),
        "notes": list(model.notes),
    }


def licence(card: cards.Card) -> dict[str, Any]:
    """The licence of a published model, for ``info``."""
    found = card.licence
    return {
        "card": card.name,
        "key": found.key,
        "name": found.name,
        "url": found.url,
        "forbidden": list(found.forbidden),
    }


def _licence_words(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    return [
        f"licence   {found['name']} ({found['key']}): {found['url']}",
        *(f"forbidden {use}" for use in found["forbidden"]),
        f"card      safelight card {found['card']}",
    ]


def _model_words(found: dict[str, Any]) -> str:
    spec = found["spec"]
    schedule = spec["schedule"]
    lines = [
        f"{found['name']} ({found['family']}), {found['native_size']} pixels a side",
        f"from      {found['source']}",
        f"digest    {found['digest'] or 'none'}",
        f"card      {spec['steps']} steps, {schedule['sampler']}, "
        f"guidance {spec['guidance_scale']:g}",
        f"schedule  {schedule['kind']}, {schedule['steps']} timesteps, predicts "
        f"{schedule['prediction_type']}",
    ]
    for part, holds in found["networks"].items():
        lines.append(f"{part:9} {holds['parameters']:>13,} parameters, {holds['tensors']} tensors")
    lines += _licence_words(found["licence"])
    return "\n".join([*lines, *(f"note      {note}" for note in found["notes"])])
