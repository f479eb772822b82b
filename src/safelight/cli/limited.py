"""``safelight evaluate limits``: the cards' biases and limits, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safelight.cli.measure import Bar
from safelight.names import DEFAULT_MODEL


def limits(
    model: Annotated[
        str, typer.Option("-m", "--model", help="A model's name or folder.")
    ] = DEFAULT_MODEL,
    section: Annotated[
        str | None,
        typer.Option(help="people,culture,language,text,faces,composition. Default: all."),
    ] = None,
    templates: Annotated[
        Path | None, typer.Option(help="Prompts of your own, in a .toml like the built-in one.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures a prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of each prompt's first picture.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the card's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the card's.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Default: the card's.")] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="A CLIP with both towers, for the counts. Default: sheets alone."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 50,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the sheets.")] = Path(
        "outputs/limits"
    ),
) -> None:
    """Draw a model's biases and limits: sheets of prompts, and what a CLIP sees in them."""
    from safelight.evaluate import limits as drawing
    from safelight.evaluate import limits_report

    names = None if section is None else [n.strip() for n in section.split(",") if n.strip()]
    sections = drawing.load(templates, names)

    import safelight
    from safelight.evaluate.features import named_clip

    towers = None if clip is None else named_clip(clip)
    if towers is not None:
        towers.words(["a picture"])  # refuses one without words, before the work
    generator = safelight.load(model)
    wishes = {"steps": steps, "guidance_scale": guidance_scale, "sampler": sampler}
    drawn = []
    with Bar() as bar:
        for one in sections:
            done, total = 0, count * len(one.all_cases())

            def tell(n: int, name: str = one.name, total: int = total) -> None:
                nonlocal done
                done += n
                bar.update(name, done, total)

            rows = drawing.draw(
                one, generator, count=count, seed=seed, batch=batch, progress=tell, **wishes
            )
            if towers is not None:
                drawing.count(one, rows, towers)
            drawn.append((one, rows))
    who = None if towers is None else f"clip:{towers.name}@{towers.digest[:12]}"
    settings = {"model": model, "weights": generator.model.digest, "count": count, "seed": seed}
    limits_report.write(output, drawn, who, **settings, **wishes)
    typer.echo(limits_report.markdown(drawn, who))
    typer.echo(f"{output}/limits.md, limits.json and sheets")
