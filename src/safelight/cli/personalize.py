"""``safelight personalize``: DreamBooth, LoRA and textual inversion from a few pictures.

Options have this program's names and those of diffusers' training scripts, which every tutorial
uses (:data:`ALIASES`), with dashes or underscores. All of them are fields of a recipe; a recipe
may be given, too, and options win over it.
"""

from __future__ import annotations

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from safelight.cli import show, train
from safelight.errors import InvalidRequest


class Method(StrEnum):
    """What is trained."""

    dreambooth = "dreambooth"
    lora = "lora"
    textual_inversion = "textual-inversion"


class Target(StrEnum):
    """Kinds of layers that LoRA adds to."""

    attention = "attention"
    feed_forward = "feed-forward"
    convolutions = "convolutions"


class Property(StrEnum):
    """What a new word stands for."""

    object = "object"
    style = "style"


class Rate(StrEnum):
    """How the rate changes over the run."""

    constant = "constant"
    constant_with_warmup = "constant-with-warmup"
    linear = "linear"
    cosine = "cosine"


class Precision(StrEnum):
    """What networks compute in while they train."""

    no = "no"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


ALIASES = {
    "instance-data-dir": "instance-data",
    "train-data-dir": "instance-data",
    "class-data-dir": "class-data",
    "pretrained-model-name-or-path": "model",
    "output-dir": "output",
    "max-train-steps": "steps",
    "train-batch-size": "batch",
    "gradient-accumulation-steps": "accumulation",
    "placeholder-token": "token",
    "initializer-token": "initializer",
    "num-vectors": "vectors",
    "lora-alpha": "alpha",
    "network-alpha": "alpha",
    "network-dim": "rank",
}
"""What scripts call an option: its name here."""
_FLAGS = {"offset_noise": "offset-noise-usual"}
"""What is a flag in the scripts, and takes a number here."""


def spelled(name: str) -> str:
    """An option's name here, for one as the scripts spell it."""
    dashed = name.replace("_", "-")
    return _FLAGS.get(name, ALIASES.get(dashed, dashed))


app = typer.Typer(add_completion=False)


@app.command(context_settings={"token_normalize_func": spelled})
def command(
    recipe_file: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="A TOML file; options win over it.")
    ] = None,
    method: Annotated[
        Method | None, typer.Option("--method", help="What is trained. (default: dreambooth)")
    ] = None,
    instance_data: Annotated[
        Path | None,
        typer.Option(
            "--instance-data",
            help="Folder with 5 to 10 pictures of the subject.",
        ),
    ] = None,
    instance_prompt: Annotated[
        str | None,
        typer.Option(
            "--instance-prompt", help="What they show, with a rare word: a photo of sks dog."
        ),
    ] = None,
    class_prompt: Annotated[
        str | None,
        typer.Option(
            "--class-prompt", help="Prior preservation: the subject's class, a photo of a dog."
        ),
    ] = None,
    class_data: Annotated[
        Path | None,
        typer.Option(
            "--class-data",
            help="Folder with pictures of the class; the model makes what is missing.",
        ),
    ] = None,
    num_class_images: Annotated[
        int | None,
        typer.Option("--num-class-images", help="How many of them. (default: 100)", min=1),
    ] = None,
    prior_loss_weight: Annotated[
        float | None, typer.Option("--prior-loss-weight", help="Of their loss. (default: 1)", min=0)
    ] = None,
    prior: Annotated[
        bool | None,
        typer.Option(
            "--with-prior-preservation/--without-prior-preservation",
            help="On where there is a class prompt.",
        ),
    ] = None,
    train_text_encoder: Annotated[
        bool | None,
        typer.Option("--train-text-encoder/--freeze-text-encoder", help="The text tower too."),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="LoRA's. (default: 4)")] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="LoRA's. (default: the rank)"),
    ] = None,
    target: Annotated[
        list[Target] | None,
        typer.Option(
            "--target", help="Layers that LoRA adds to; may be repeated. (default: attention)"
        ),
    ] = None,
    token: Annotated[str | None, typer.Option("--token", help="The new word: <my-dog>.")] = None,
    initializer: Annotated[
        str | None,
        typer.Option("--initializer", help="A known word that it starts as."),
    ] = None,
    vectors: Annotated[
        int | None, typer.Option("--vectors", help="Vectors for it. (default: 1)", min=1)
    ] = None,
    learnable: Annotated[
        Property | None, typer.Option("--learnable-property", help="(default: object)")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="What to start from: a name, folder, file or hub id. (default: tiny)",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the run and its result."),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option("--resolution", min=8, help="(default: the model's own)")
    ] = None,
    center_crop: Annotated[
        bool | None,
        typer.Option("--center-crop", help="Cut squares from the middle, not anywhere."),
    ] = None,
    random_flip: Annotated[
        bool | None, typer.Option("--random-flip", help="Half of the pictures mirrored.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Length of the run.", min=1)] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Pictures at once.", min=1)] = None,
    accumulation: Annotated[
        int | None,
        typer.Option("--accumulation", help="Batches a step.", min=1),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="(default: as published for the method)")
    ] = None,
    lr_scheduler: Annotated[
        Rate | None, typer.Option("--lr-scheduler", help="(default: constant)")
    ] = None,
    lr_warmup_steps: Annotated[
        int | None,
        typer.Option("--lr-warmup-steps", min=0, help="Steps over which the rate rises."),
    ] = None,
    snr_gamma: Annotated[
        float | None, typer.Option("--snr-gamma", help="Min-SNR weighting; 5 is usual.")
    ] = None,
    offset_noise: Annotated[
        float | None, typer.Option("--offset-noise", min=0, help="Its strength; 0.1 is usual.")
    ] = None,
    offset_usual: Annotated[bool, typer.Option("--offset-noise-usual", hidden=True)] = False,
    mixed_precision: Annotated[
        Precision | None, typer.Option("--mixed-precision", help="bf16, where it is fast.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="Less memory, a third more time."),
    ] = None,
    use_8bit_adam: Annotated[
        bool | None, typer.Option("--use-8bit-adam", help="Where bitsandbytes is installed.")
    ] = None,
    checkpointing_steps: Annotated[
        int | None, typer.Option("--checkpointing-steps", help="(default: 500)", min=1)
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume-from-checkpoint", help="Only latest: runs go on by themselves."),
    ] = None,
    validation_prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--validation-prompt", help="Held-out prompt of the sample sheets; may be repeated."
        ),
    ] = None,
    num_validation_images: Annotated[
        int | None, typer.Option("--num-validation-images", help="(default: 4)", min=1)
    ] = None,
    validation_steps: Annotated[
        int | None, typer.Option("--validation-steps", help="Between sheets. (default: 100)", min=1)
    ] = None,
    clip: Annotated[
        Path | None, typer.Option("--clip", help="A CLIP's folder, for the copying alarm.")
    ] = None,
    half: Annotated[bool | None, typer.Option("--half", help="Write float16.")] = None,
    seed: Annotated[int | None, typer.Option("-s", "--seed", min=0)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, and train nothing.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=1024, help="CPU threads.")
    ] = None,
    stop_after: Annotated[
        float | None,
        typer.Option("--stop-after", min=0, help="Minutes; then it saves and stops."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Teach a model a subject, from a few pictures of it. The same command again resumes.

    Every now and then it makes samples of the held-out prompts, by the engine that generates, and
    warns when they begin to copy the pictures.
    """
    if resume not in (None, "latest"):
        raise InvalidRequest(
            "resume-from-checkpoint", f"{resume} cannot be chosen.",
            "The same command goes on from the newest whole checkpoint.",
        )  # fmt: skip
    if prior and not class_prompt and recipe_file is None:
        raise InvalidRequest("class-prompt", "is missing.", "It says what is to be preserved.")
    if mixed_precision == Precision.fp16:
        raise InvalidRequest("mixed-precision", "fp16 needs a scaled loss.", "Use bf16.")
    personal = _given(
        method=None if method is None else method.value.replace("-", "_"),
        model=model,
        instance_data=instance_data,
        instance_prompt=instance_prompt,
        class_prompt=class_prompt,
        class_data=class_data,
        num_class_images=num_class_images,
        prior_loss_weight=prior_loss_weight,
        train_text_encoder=train_text_encoder,
        rank=rank,
        alpha=alpha,
        targets=None if not target else [each.value.replace("-", "_") for each in target],
        token=token,
        initializer=initializer,
        vectors=vectors,
        learnable=None if learnable is None else learnable.value,
        resolution=resolution,
        crop=None if center_crop is None else "center",
        flip=random_flip,
        weighting=None if snr_gamma is None else "min_snr",
        min_snr_gamma=snr_gamma,
        offset_noise=0.1 if offset_usual and offset_noise is None else offset_noise,
        validation_prompts=validation_prompt or None,
        validation_images=num_validation_images,
        clip=clip,
        half=half,
    )
    if prior is False:
        personal |= {"class_prompt": "", "class_data": None}
    optim = _given(
        batch=batch,
        accumulation=accumulation,
        lr=learning_rate,
        warmup_steps=lr_warmup_steps,
        kind="adamw8bit" if use_8bit_adam else None,
        **_shape(lr_scheduler),
    )
    top = _given(
        output=output,
        steps=steps,
        seed=seed,
        threads=threads,
        gradient_checkpointing=gradient_checkpointing,
        precision=None
        if mixed_precision is None
        else ("bfloat16" if mixed_precision == Precision.bf16 else "float32"),
    )
    fields = _fields(recipe_file, {**top, "optim": optim, "personal": personal})
    recipe = _resolved(fields, recipe_file, checkpointing_steps, validation_steps)
    train.follow([recipe], dry_run, 0, stop_after, as_json)
    if not dry_run and not as_json:
        _tell(recipe)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _shape(rate: Rate | None) -> dict[str, Any]:
    if rate is None:
        return {}
    if rate in (Rate.linear, Rate.cosine):
        return {"decay": 1.0, "decay_shape": rate.value}
    return {"decay": 0.0}


RATES = {"dreambooth": 5e-6, "lora": 1e-4, "textual_inversion": 5e-4}
"""As published: diffusers' scripts and their documents."""
STEPS = {"dreambooth": 400, "lora": 500, "textual_inversion": 3000}


def _fields(recipe_file: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """The recipe's fields with the options', and defaults for what neither says."""
    from safelight.train.recipe import merged_with

    fields: dict[str, Any] = {}
    if recipe_file is not None:
        try:
            fields = tomllib.loads(recipe_file.read_text())
        except (OSError, ValueError) as error:
            raise InvalidRequest("recipe", f"{recipe_file} cannot be read: {error}.") from error
        if "personal" not in fields:
            raise InvalidRequest(
                "personal", f"{recipe_file} has no such section.", "Use safelight train."
            )
    if "steps" in options:
        fields.pop("images", None)
    if "warmup_steps" in options["optim"] and "optim" in fields:
        fields["optim"].pop("warmup", None)
    fields = merged_with(fields, options)
    personal, optim = fields["personal"], fields.setdefault("optim", {})
    if "instance_data" not in personal:
        raise InvalidRequest("instance-data", "is missing.", "Name a folder of 5 to 10 pictures.")
    method = personal.setdefault("method", "dreambooth")
    lr = RATES.get(method, 1e-4)
    if method == "dreambooth" and personal.get("train_text_encoder"):
        lr = 2e-6
    fields["optim"] = {"batch": 1, "lr": lr, "decay": 0.0, **optim}
    if "steps" not in fields and "images" not in fields:
        preserving = method == "dreambooth" and personal.get("class_prompt")
        fields["steps"] = 800 if preserving else STEPS.get(method, 500)
    fields.setdefault("ema", {"decay": 0.0})
    name = f"{Path(personal['instance_data']).resolve().name}-{method.replace('_', '-')}"
    fields.setdefault("output", Path("runs") / name)
    fields.setdefault("name", Path(fields["output"]).name)
    return fields


def _resolved(
    fields: dict[str, Any], recipe_file: Path | None, checkpointing: int | None, showing: int | None
) -> Any:
    from safelight.train.recipe import recipe_of

    recipe = recipe_of(fields, recipe_file or "the command line")
    every = {"save_every": (checkpointing, 500), "sample_every": (showing, 100)}
    changes = {
        name: (given or default) * recipe.optim.step
        for name, (given, default) in every.items()
        if given is not None or name not in fields
    }
    return recipe.replace(**changes)


def _tell(recipe: Any) -> None:
    """How to use what came out."""
    personal, place = recipe.personal, recipe.output
    use = {
        "dreambooth": f'safelight generate "{personal.instance_prompt}" -m {place}',
        "lora": f'safelight generate "{personal.instance_prompt}" -m {personal.model} '
        f"--lora {place / 'pytorch_lora_weights.safetensors'}",
        "textual_inversion": f'safelight generate "a {personal.token}" -m {personal.model} '
        f"--embedding {place / 'learned_embeds.safetensors'}",
    }
    show.words().print(use[personal.method], markup=False, soft_wrap=True)
