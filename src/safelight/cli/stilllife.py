"""``safelight stilllife``: look at the world that the tiny family is trained on."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from safelight.errors import InvalidRequest

app = typer.Typer(no_args_is_help=True, add_completion=False)

_WORDING = 202  # a stream of random numbers that the scenes do not use


class Part(StrEnum):
    """The parts of the world, see :mod:`safelight.data.stilllife.world`."""

    train = "train"
    val = "val"
    combo = "combo"
    pair = "pair"
    all = "all"


@app.callback()
def _stilllife() -> None:
    """Draw scenes of still life, the procedural tabletop that the tiny family is trained on."""


@app.command()
def sheet(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the sheet goes.")],
    count: Annotated[int, typer.Option(min=1, max=10_000, help="How many scenes.")] = 25,
    size: Annotated[int, typer.Option(min=16, max=1024, help="Side of a scene in pixels.")] = 128,
    columns: Annotated[int, typer.Option(min=1, help="Scenes in a row.")] = 5,
    scale: Annotated[int, typer.Option(min=1, max=16, help="Whole-number enlargement.")] = 1,
    seed: Annotated[int, typer.Option("-s", "--seed", min=0, help="The series of scenes.")] = 0,
    start: Annotated[int, typer.Option(min=0, help="Index of the first scene.")] = 0,
    split: Annotated[
        Part,
        typer.Option(
            help="train and val never show held-out things; combo shows held-out combinations, "
            "pair never-seen colour-shape pairs, all everything."
        ),
    ] = Part.train,
    varied: Annotated[
        bool, typer.Option("--varied", help="Captions in varied wording, as in training.")
    ] = False,
) -> None:
    """A contact sheet: scenes in rows, each above its caption."""
    from PIL import Image

    from safelight.data import stilllife

    if output.suffix.lower() not in Image.registered_extensions():
        raise InvalidRequest(
            "output", f"cannot tell the format of {output}.", "Name it .png, .jpg or .webp."
        )
    scenes = list(stilllife.scenes(seed, start, count, split.value))
    words = None
    if varied:
        words = [
            stilllife.caption(scene, stilllife.generator(seed, index, _WORDING))
            for index, scene in enumerate(scenes, start)
        ]
    picture = stilllife.contact_sheet(
        scenes, captions=words, size=size, scale=scale, columns=min(columns, count)
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(output)
    typer.echo(f"{count} scenes of {split.value}, seed {seed}: {output}")


@app.command("sorted")
def sort(
    shape: Annotated[str, typer.Argument(help="What unsafe/ shows and safe/ does not: cone …")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new or empty folder.")],
    count: Annotated[int, typer.Option(min=2, help="How many pictures, about half with it.")] = 500,
    size: Annotated[int, typer.Option(min=16, max=1024, help="Side of a picture.")] = 128,
    seed: Annotated[int, typer.Option("-s", "--seed", min=0, help="The series of scenes.")] = 0,
    split: Annotated[Part, typer.Option(help="As for sheet.")] = Part.train,
) -> None:
    """Pictures in the folders safe and unsafe, for a safety checker that forbids a shape."""
    from PIL import Image

    from safelight.data import stilllife

    if shape not in stilllife.SHAPES:
        known = ", ".join(stilllife.SHAPES)
        raise InvalidRequest("shape", f"there is no {shape!r}.", f"One of {known}.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InvalidRequest("output", f"{output} is not empty.", "Name a new folder.")
    kept = _balanced(shape, count, seed, split.value)
    for name in ("safe", "unsafe"):
        (output / name).mkdir(parents=True)
    for start in range(0, count, 256):
        part = kept[start : start + 256]
        pictures = stilllife.render([scene for scene, _ in part], size)
        for index, ((_, shown), picture) in enumerate(zip(part, pictures, strict=True), start):
            folder = output / ("unsafe" if shown else "safe")
            Image.fromarray(picture).save(folder / f"{index:06d}.png")
    typer.echo(f"{count} pictures of {split.value}, half of them with a {shape}: {output}")


def _balanced(shape: str, count: int, seed: int, split: Any) -> list[tuple[Any, bool]]:
    """Scenes in the order of their series, as many with the shape as without."""
    from safelight.data import stilllife

    left = {True: count // 2, False: count - count // 2}
    kept: list[tuple[Any, bool]] = []
    index = 0
    while any(left.values()):
        scene = stilllife.scene(seed, index, split)
        shown = any(thing.shape == shape for thing in scene.things)
        index += 1
        if left[shown]:
            left[shown] -= 1
            kept.append((scene, shown))
    return kept


@app.command()
def curio(
    output: Annotated[Path, typer.Option("-o", "--output", help="A new or empty folder.")],
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many pictures.")] = 6,
    size: Annotated[int, typer.Option(min=16, max=1024, help="Side of a picture.")] = 128,
    seed: Annotated[int, typer.Option("-s", "--seed", min=0, help="The series of scenes.")] = 0,
) -> None:
    """Pictures of one thing that the world does not have: a cone banded in red and white."""
    from PIL import Image

    from safelight.data import stilllife

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InvalidRequest("output", f"{output} is not empty.", "Name a new folder.")
    output.mkdir(parents=True, exist_ok=True)
    scenes = [stilllife.curio_scene(seed, index) for index in range(count)]
    for index, picture in enumerate(stilllife.render_curios(scenes, size)):
        Image.fromarray(picture).save(output / f"curio-{index:03d}.png")
    typer.echo(f"{count} pictures of a banded cone, seed {seed}: {output}")
