"""``safelight evaluate memorisation``: are generated pictures training pictures?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli.measure import Bar, Clip
from safelight.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL import Image

    from safelight.evaluate.memorisation_report import Findings


def memorisation(
    training: Annotated[str, typer.Argument(help="The pictures that the model was trained on.")],
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Asked with training captions.")
    ] = None,
    pictures: Annotated[str | None, typer.Option(help="Generated pictures, instead.")] = None,
    deduplicated: Annotated[
        str | None,
        typer.Option(help="A model trained on the same pictures without duplicates, to compare."),
    ] = None,
    deduplicated_pictures: Annotated[
        str | None, typer.Option(help="Its pictures, instead.")
    ] = None,
    control: Annotated[
        str | None, typer.Option(help="Real pictures that no training saw: false alarms.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures to make, or to read.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice, and the first picture.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the card's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the card's.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Default: the card's.")] = None,
    pixels: Annotated[float, typer.Option(min=0, max=1, help="A copy is no farther.")] = 0.15,
    cosine: Annotated[float, typer.Option(min=0, max=1, help="A copy is no less alike.")] = 0.98,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Of duplicates: exact, perceptual, embedding. Default: the first two."),
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="Of `safelight data index` with the same CLIP.")
    ] = None,
    caption: Annotated[str | None, typer.Option(help="Column that holds the captions.")] = None,
    clip: Clip = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 50,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for numbers and sheets.")
    ] = Path("outputs/memorisation"),
) -> None:
    """The nearest training picture of generated ones, and how often they are copies."""
    if (model is None) == (pictures is None):
        raise InvalidRequest("model", "give either --model or --pictures.")
    if deduplicated is not None and deduplicated_pictures is not None:
        raise InvalidRequest("deduplicated", "comes with its pictures.", "Give one of the two.")

    import safelight
    from safelight.data.index import Index
    from safelight.data.sources import open_source
    from safelight.evaluate import memorisation as m
    from safelight.evaluate import memorisation_report as report
    from safelight.evaluate.features import named_clip

    source = open_source(training, caption=caption)
    known = None if index is None else Index.load(index)
    chosen = m.captions_of(source, count, seed) if model or deduplicated else []
    opened = {p: open_source(p) for p in (pictures, deduplicated_pictures, control) if p}
    towers = named_clip(clip)
    wishes = {"steps": steps, "guidance_scale": guidance_scale, "sampler": sampler}
    sets: list[Findings] = []
    with Bar() as bar:
        done: dict[str, int] = {}

        def tell(stage: str, n: int, total: int = len(source)) -> None:
            done[stage] = done.get(stage, 0) + n
            bar.update(stage, done[stage], total)

        seen = m.study(source, towers, index=known, methods=method or m.USUAL, progress=tell)  # type: ignore[arg-type]
        for name, its_model, its_pictures in (
            ("generated", model, pictures),
            ("without duplicates", deduplicated, deduplicated_pictures),
            ("control", None, control),
        ):
            stream: Iterable[tuple[str, Image.Image]]
            prompted: Any = None
            if its_model is not None:
                stream = prompted = m.Prompted(
                    safelight.load(its_model), chosen, batch=batch,
                    progress=lambda n, name=name: tell(name, n, len(chosen)), **wishes,
                )  # fmt: skip
            elif its_pictures is not None:
                stream = m.named(opened[its_pictures], count)
            else:
                continue
            some = report.Findings(name)
            for found, picture in m.nearest(seen, towers, stream):
                some.add(found, picture)
            some.flagged = prompted.flagged if prompted is not None else 0
            sets.append(some)
    limits = {"pixels": pixels, "cosine": cosine}
    settings = {
        "model": model, "pictures": pictures, "deduplicated": deduplicated,
        "deduplicated_pictures": deduplicated_pictures, "control": control, "seed": seed, **wishes,
    }  # fmt: skip
    report.write(output, seen, sets, **limits, **settings)
    typer.echo(report.markdown(seen, sets, **limits))
    typer.echo(f"{output}/memorisation.json, memorisation.md and sheets (nearest-generated.png)")
