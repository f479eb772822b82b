"""``safelight replay``: make a picture again, and compare the two."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli import adapters, naming, original, show
from safelight.cli.generate import Dtype, looks
from safelight.errors import InvalidRequest, SafelightError

if TYPE_CHECKING:
    from safelight.provenance import Provenance, Replay


def command(
    picture: Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP that says how it was made.")],
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Instead of the one that the file names.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where the new picture goes, if anywhere.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Instead of the one it was made on.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Instead of the one it was made in.")
    ] = None,
    lora_dir: Annotated[
        list[Path] | None, typer.Option("--lora-dir", help="Where the LoRAs that it names are.")
    ] = None,
    embedding_dir: Annotated[
        list[Path] | None, typer.Option("--embedding-dir", help="The same, textual inversions.")
    ] = None,
    ema: original.Ema = None,
    prediction_type: original.Prediction = None,
    family: original.Family = None,
    layers: original.Layers = None,
    tokenizer: original.TokenizerPlace = None,
    clip_stats: original.ClipStats = None,
    image: Annotated[
        list[str] | None, typer.Option("-i", "--image", help="The picture it was made from.")
    ] = None,
    mask: Annotated[str | None, typer.Option("--mask", help="Its mask.")] = None,
    depth: Annotated[str | None, typer.Option("--depth", help="Its depth map.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Make a picture again from what it says, and report the difference.

    On the same plan (kernels, threads, versions) there is none; if there is, the exit code is 1.
    """
    if output is not None and output.suffix.lower() not in naming.ENDINGS:
        raise InvalidRequest("output", f"cannot tell the format of {output}.", "Name it .png.")
    from safelight import provenance

    found = provenance.read(picture)
    name = model or found.model
    if name is None:
        raise InvalidRequest("model", f"{picture} names none that can be loaded.", "Give -m MODEL.")
    say = show.words()
    say.quiet = as_json
    with say.status(f"making {picture.name} again …"):
        from safelight.generate import load

        where, how = _machine(found, device, None if dtype is None else dtype.value)
        given = looks(image, mask=mask, depth=depth)
        known = adapters.folders(lora_dir, embedding_dir, found.request)
        how_read = original.given(ema, prediction_type, family, layers, tokenizer, clip_stats)
        again = load(name, device=where, dtype=how, **known, **how_read)
        replayed = again.replay(picture, **given)
    if output is not None and replayed.result.image is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        provenance.save(replayed.result, output)
    broken = replayed.broken
    if as_json:
        show.document(_document(picture, replayed, output))
    else:
        typer.echo(_words(picture, replayed))
        if output is not None:
            typer.echo(output)
    if replayed.difference is None:
        result = replayed.result
        raise SafelightError(f"there is no new picture: {result.outcome}: {result.message}")
    if broken:
        raise SafelightError("the plan is the same but the picture is not.")


def _machine(
    found: Provenance, device: str | None, dtype: str | None
) -> tuple[str | None, str | None]:
    """The device, dtype and thread count that the picture was made with, as far as they are here.

    Sets this process's thread count, which only a command may.
    """
    import torch

    from safelight.model import pick_device, pick_dtype

    plan = found.record.get("plan", {})
    if device is None and plan:
        try:
            device = str(pick_device(plan["device"]))
        except InvalidRequest:
            device = None
    if dtype is None and plan:
        try:
            pick_dtype(plan["dtype"], pick_device(device), tiny=False)
            dtype = plan["dtype"]
        except InvalidRequest:
            dtype = None
    threads = plan.get("threads")
    if isinstance(threads, int) and 0 < threads <= 256:
        torch.set_num_threads(threads)
    return device, dtype


def _words(picture: Path, replayed: Replay) -> str:
    difference = replayed.difference
    if difference is None:
        return f"{picture}: no picture to compare with"
    lines = [
        f"{picture}: largest difference {difference.largest}/255, mean {difference.mean:.4f}/255, "
        f"{difference.equal:.2%} of values equal"
    ]
    if replayed.lossy:
        same = {True: "the same", False: "not the same", None: "unknown"}[replayed.same_pixels]
        lines.append(f"the file's format is lossy; before it, the pixels are {same}")
    plan = "the same" if replayed.same_plan else "another"
    lines.append(f"plan: {plan}")
    lines += [f"  {change}" for change in replayed.changes]
    return "\n".join(lines)


def _document(picture: Path, replayed: Replay, output: Path | None) -> dict[str, Any]:
    return {
        "schema": 1,
        "picture": picture,
        "difference": None if replayed.difference is None else asdict(replayed.difference),
        "same_plan": replayed.same_plan,
        "same_model": replayed.same_model,
        "same_pixels": replayed.same_pixels,
        "lossy": replayed.lossy,
        "changes": list(replayed.changes),
        "outcome": replayed.result.outcome,
        "message": replayed.result.message,
        "output": output,
    }
