"""``safelight evaluate``: a model's scores on the fixed prompt lists.

What else can be measured is a command behind it (``safelight evaluate metrics``), in
:mod:`safelight.cli.measure`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelight.cli import compared, limited, measure, memorised, varying
from safelight.errors import InvalidRequest
from safelight.names import DEFAULT_MODEL

if TYPE_CHECKING:
    from safelight.evaluate.score import Generate, ListScore

LISTS = ("seen", "held_out", "single", "pair")


def command(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Option("-m", "--model", help="A model's name or folder.")
    ] = DEFAULT_MODEL,
    lists: Annotated[
        str, typer.Option("--list", help="Which prompt lists, separated by commas.")
    ] = ",".join(LISTS),
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first prompts of each list.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 25,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the model card's.")] = None,
    sampler: Annotated[str, typer.Option(help="As for safelight generate.")] = "dpm++2m",
    sweep: Annotated[
        str | None,
        typer.Option(
            help="Guidance scales, separated by commas: the best on the tuning list is chosen, "
            "then all are reported on the other lists."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 50,
    ceilings: Annotated[
        bool, typer.Option(help="Also score real renders and reconstructions.")
    ] = True,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for numbers and sheets.")
    ] = Path("outputs/evaluation"),
) -> None:
    """Score a model: prompts with known answers, read by a judge, beside the judge's ceiling.

    Other measurements are the commands below; each has options of its own.
    """
    if ctx.invoked_subcommand is not None:
        _nothing_before(ctx)
        return
    names = _names(lists)
    scales = None if sweep is None else _scales(sweep)
    if scales is not None and guidance_scale is not None:
        raise InvalidRequest("guidance_scale", "a sweep chooses it.", "Leave one of the two out.")

    import safelight
    from safelight.evaluate import prompts, report
    from safelight.evaluate.judge import Judge
    from safelight.evaluate.score import score_list
    from safelight.evaluate.towers import autoencode, clip_features
    from safelight.evaluate.variation import must_vary

    judge = Judge.load()
    generator = safelight.load(model)
    if must_vary(generator):
        if scales is not None:
            raise InvalidRequest("sweep", f"{model} makes pictures of pictures.", "Leave it out.")
        wishes = {"steps": steps, "guidance_scale": guidance_scale, "sampler": sampler}
        varying.lists(generator, model, names, limit, wishes, batch=batch, output=output)
        return
    # A model without a vision tower is scored without the Fréchet distance.
    vae, vision = generator.model.vae, generator.model.vision
    settings = {"model": model, "steps": steps, "sampler": sampler}

    def measured(name: str, scale: float | None, *, with_ceilings: bool) -> ListScore:
        with measure.Bar() as bar:
            return score_list(
                name,
                prompts.load(name, limit),
                batch_function(generator, steps=steps, guidance_scale=scale, sampler=sampler),
                judge,
                autoencode=autoencode(vae),
                features=None if vision is None else clip_features(vision),
                ceilings=with_ceilings,
                batch=batch,
                progress=bar.update,
            )

    if scales is None:
        scores = [measured(name, guidance_scale, with_ceilings=ceilings) for name in names]
        report.write(output, scores, guidance_scale=guidance_scale, **settings)
        typer.echo(report.markdown(scores))
        typer.echo(f"{output}/scores.json, scores.md and sheets")
        return

    tuned = {s: measured("tuning", s, with_ceilings=False) for s in scales}
    best = max(scales, key=lambda s: tuned[s].generated.cells["all"].value)
    lines = ["| guidance | tuning | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
    for scale in scales:
        here = [measured(name, scale, with_ceilings=ceilings and scale == best) for name in names]
        report.write(output / f"guidance-{scale:g}", here, guidance_scale=scale, **settings)
        cells = [tuned[scale], *here]
        mark = " (chosen on tuning)" if scale == best else ""
        row = " | ".join(str(s.generated.cells["all"]) for s in cells)
        lines.append(f"| {scale:g}{mark} | {row} |")
    table = "\n".join(lines) + "\n"
    (output / "sweep.md").write_text(table)
    typer.echo(table)


def _nothing_before(ctx: typer.Context) -> None:
    """Options of the lists mean nothing to another measurement."""
    for name in ctx.params:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            where = f"Write it behind {ctx.invoked_subcommand}, if that has it."
            raise InvalidRequest(name, "belongs to the prompt lists.", where)


app = typer.Typer(add_completion=False)
app.callback(invoke_without_command=True)(command)
app.command("metrics")(measure.metrics)
app.command("compare")(compared.compare)
app.command("pareto")(measure.pareto)
app.command("variations")(varying.variations)
app.command("memorisation")(memorised.memorisation)
app.command("limits")(limited.limits)


def batch_function(
    generator: Any, *, steps: int, guidance_scale: float | None, sampler: str
) -> Generate:
    """The generator's ``generate`` as a function of prompts and seeds.

    Raises:
        SafelightError: a picture is missing: a score over the others would lie.
    """
    from safelight.evaluate.drawing import drawn

    return drawn(generator, steps=steps, guidance_scale=guidance_scale, sampler=sampler)


def _names(lists: str) -> list[str]:
    names = [n.strip() for n in lists.split(",") if n.strip()]
    known = (*LISTS, "tuning", "paired")
    for name in names:
        if name not in known:
            raise InvalidRequest("list", f"no list {name!r}.", f"Choose of {', '.join(known)}.")
    if not names:
        raise InvalidRequest("list", "names no list.", f"Choose of {', '.join(known)}.")
    return names


def _scales(text: str) -> list[float]:
    try:
        scales = [float(v) for v in text.split(",")]
    except ValueError:
        raise InvalidRequest("sweep", f"{text!r} is not numbers.", "Write 1,2,3,5,7.5.") from None
    if any(not 0 <= s < 100 for s in scales):
        raise InvalidRequest("sweep", f"{text!r}: a scale is outside 0..100.")
    return sorted(set(scales))
