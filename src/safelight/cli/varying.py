"""``safelight evaluate variations``: what a model keeps of the pictures that it varies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli.measure import Bar, Clip
from safelight.errors import InvalidRequest

if TYPE_CHECKING:
    from safelight.generate import Generator


def variations(
    model: Annotated[
        str, typer.Option("-m", "--model", help="A model of image variations, or unCLIP.")
    ] = "image-variations",
    images: Annotated[
        str | None, typer.Option(help="Folder, shards or tables of pictures to vary.")
    ] = None,
    list_: Annotated[
        str, typer.Option("--list", help="Without --images: renders of still life's lists.")
    ] = "held_out",
    count: Annotated[int | None, typer.Option(min=2, help="Only the first pictures.")] = None,
    noise_levels: Annotated[
        str | None, typer.Option(help="Of unCLIP, separated by commas: a row each.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the card's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the card's.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Default: the card's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture of --images.")] = 0,
    clip: Clip = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 50,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for numbers and sheets.")
    ] = Path("outputs/variations"),
) -> None:
    """What variations keep: CLIP cosine of input and output, and still life's attributes."""
    levels = _levels(noise_levels)
    names = [n.strip() for n in list_.split(",") if n.strip()]
    wishes = {"steps": steps, "guidance_scale": guidance_scale, "sampler": sampler}

    import safelight

    if images is not None:
        from safelight.data.sources import open_source

        source = open_source(images)
    generator = safelight.load(model)
    if images is None:
        lists(
            generator, model, names, count, wishes,
            levels=levels, clip=clip, batch=batch, output=output,
        )  # fmt: skip
        return
    from safelight.evaluate import variation, variation_report
    from safelight.evaluate.features import named_clip
    from safelight.evaluate.sets import readable

    variation.check(generator, levels)
    extractor = variation.model_extractor(generator, model, named_clip(clip) if clip else None)
    total, rows = min(len(source), count or len(source)), []
    with Bar() as bar:
        for level in levels:
            stage = "variations" if level is None else f"noise level {level}"
            vary = variation.varied(generator, noise_level=level, **wishes)
            row, _, _ = variation.kept(
                images, readable(source, count), vary, extractor,
                seeds=range(seed, seed + total), batch=batch,
                progress=lambda done, stage=stage: bar.update(stage, done, total),
            )  # fmt: skip
            row.noise_level = level
            rows.append(row)
    settings = {"model": model, "weights": generator.model.digest, "seed": seed, **wishes}
    variation_report.write(output, rows, **settings)
    typer.echo(variation_report.markdown(rows))
    typer.echo(f"{output}/variations.json, variations.md and sheets")


def lists(
    generator: Generator,
    model: str,
    names: Sequence[str],
    limit: int | None,
    wishes: dict[str, Any],
    *,
    levels: Sequence[int | None] = (None,),
    clip: str | None = None,
    batch: int,
    output: Path,
) -> None:
    """Measure a model on renders of still life's lists."""
    from safelight.evaluate import prompts, variation, variation_report
    from safelight.evaluate.features import named_clip
    from safelight.evaluate.judge import Judge

    for name in names:
        if name not in prompts.DIGESTS:
            raise InvalidRequest("list", f"no list {name!r}.", ", ".join(prompts.DIGESTS))
    variation.check(generator, levels)
    extractor = variation.model_extractor(generator, model, named_clip(clip) if clip else None)
    judge, rows = Judge.load(), []
    with Bar() as bar:
        for name in names:
            chosen = prompts.load(name, limit)
            total = len(chosen)
            for level in levels:
                stage = name if level is None else f"{name}, noise level {level}"
                row = variation.kept_of_list(
                    name, chosen, variation.varied(generator, noise_level=level, **wishes),
                    extractor, judge, size=generator.model.spec.native_size, batch=batch,
                    progress=lambda done, s=stage, n=total: bar.update(s, done, n),
                )  # fmt: skip
                row.noise_level = level
                rows.append(row)
    settings = {"model": model, "weights": generator.model.digest, **wishes}
    variation_report.write(output, rows, **settings)
    typer.echo(variation_report.markdown(rows))
    typer.echo(f"{output}/variations.json, variations.md and sheets")


def _levels(text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    try:
        return list(dict.fromkeys(int(v) for v in text.split(",")))
    except ValueError:
        problem = f"{text!r} is not whole numbers."
        raise InvalidRequest("noise_levels", problem, "Write 0,250,500.") from None
