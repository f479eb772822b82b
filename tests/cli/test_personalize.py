"""``safelight personalize``: the scripts' options, a real run of two steps, and its words."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from personal_micro import PROMPT, write_model, write_pictures
from safelight.cli.main import _load, main
from safelight.cli.personalize import ALIASES, app, spelled
from safelight.names import DEFAULT_MODEL


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(["personalize", *map(str, arguments)])
    return int(leaving.value.code or 0)


def resolved(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert run(*arguments, "--dry-run") == 0
    return json.loads(capsys.readouterr().out)["recipe"]


def test_a_tutorial_s_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """diffusers' own DreamBooth example, option by option."""
    recipe = resolved(
        capsys,
        "--pretrained_model_name_or_path=CompVis/stable-diffusion-v1-4",
        f"--instance_data_dir={tmp_path}",
        "--class_data_dir=classes",
        "--output_dir=out",
        "--with_prior_preservation",
        "--prior_loss_weight=0.5",
        "--instance_prompt=a photo of sks dog",
        "--class_prompt=a photo of dog",
        "--resolution=512",
        "--train_batch_size=2",
        "--gradient_accumulation_steps=3",
        "--gradient_checkpointing",
        "--learning_rate=2e-6",
        "--lr_scheduler=constant",
        "--lr_warmup_steps=0",
        "--num_class_images=200",
        "--max_train_steps=800",
        "--train_text_encoder",
        "--checkpointing_steps=100",
        "--resume_from_checkpoint=latest",
        "--validation_prompt=a sks dog in a bucket",
        "--snr_gamma=5.0",
        "--offset_noise",
        "--mixed_precision=bf16",
        "--seed=7",
    )
    personal, optim = recipe["personal"], recipe["optim"]
    assert personal["model"] == "CompVis/stable-diffusion-v1-4"
    assert (personal["class_data"], personal["num_class_images"]) == ("classes", 200)
    assert (personal["prior_loss_weight"], personal["offset_noise"]) == (0.5, 0.1)
    assert (personal["weighting"], personal["min_snr_gamma"]) == ("min_snr", 5.0)
    assert personal["validation_prompts"] == ["a sks dog in a bucket"]
    assert personal["train_text_encoder"]
    assert (optim["batch"], optim["accumulation"], optim["lr"]) == (2, 3, 2e-6)
    assert (recipe["images"], recipe["save_every"]) == (4800, 600)
    assert (recipe["precision"], recipe["seed"]) == ("bfloat16", 7)
    assert recipe["gradient_checkpointing"]
    assert recipe["output"] == "out"
    assert recipe["data"]["source"] == str(tmp_path)


@pytest.mark.parametrize(
    ("method", "more", "lr", "steps"),
    [
        ("dreambooth", (), 5e-6, 400),
        ("dreambooth", ("--class-prompt", "a dog"), 5e-6, 800),
        ("dreambooth", ("--train-text-encoder",), 2e-6, 400),
        ("lora", (), 1e-4, 500),
        ("textual-inversion", ("--token", "<x>", "--initializer_token", "a"), 5e-4, 3000),
    ],
)  # fmt: skip
def test_defaults_are_the_published_ones(
    capsys: pytest.CaptureFixture[str], method: str, more: tuple[str, ...], lr: float, steps: int
) -> None:
    recipe = resolved(
        capsys, "--method", method, "--instance-data", "x", "--instance-prompt", "y", *more
    )
    assert (recipe["optim"]["lr"], recipe["images"]) == (lr, steps)
    assert recipe["optim"]["decay"] == recipe["ema"]["decay"] == 0.0
    assert recipe["output"] == f"runs/x-{method}"


def test_every_alias_means_an_option() -> None:
    import typer

    names = {o.lstrip("-") for p in typer.main.get_command(app).params for o in p.opts}
    assert set(ALIASES.values()) <= names
    assert not set(ALIASES) & names
    assert spelled("num_class_images") == "num-class-images"


def test_options_win_over_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'name = "mine"\noutput = "there"\nsteps = 50\nsave_every = 7\n[optim]\nbatch = 2\n'
        '[personal]\ninstance_data = "x"\ninstance_prompt = "y"\nclass_prompt = "z"\n'
    )
    assert resolved(capsys, file)["images"] == 100
    recipe = resolved(capsys, file, "--steps", 10, "--without-prior-preservation", "--batch", 4)
    assert (recipe["images"], recipe["name"], recipe["save_every"]) == (40, "mine", 7)
    assert recipe["personal"]["class_prompt"] == ""


def test_mistakes_are_named_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ("--instance-data", tmp_path / "no", "--instance-prompt", "y")
    for code, said, arguments in (
        (2, "instance-data", ()),
        (2, "no folder", given),
        (2, "class-prompt", (*given, "--with-prior-preservation")),
        (2, "Use bf16", (*given, "--mixed-precision", "fp16")),
        (2, "newest whole checkpoint", (*given, "--resume_from_checkpoint", "checkpoint-500")),
        (2, "token and initializer", (*given, "--method", "textual-inversion")),
        (2, "cannot be read", (tmp_path / "no.toml",)),
    ):
        assert run(*arguments) == code
        assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_run_from_beginning_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "micro")
    pictures = write_pictures(tmp_path / "subject")
    arguments = (
        *("--method", "lora", "-m", model, "--instance_data_dir", pictures),
        *("--instance_prompt", PROMPT, "--class_prompt", "a cat", "--num_class_images", 2),
        *("-o", tmp_path / "out", "--steps", 2, "--num_validation_images", 1),
    )
    assert run(*arguments, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["seen"] == 2
    assert document["validation"]["copies"] == 0
    assert 0 < document["validation"]["trained_percent"] < 30
    assert load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert len(list((tmp_path / "out" / "class-pictures").glob("*.png"))) == 2
    assert len(list((tmp_path / "out").glob("samples-*.png"))) == 1
    # Again, it has nothing to do, and says how to use what there is.
    assert run(*arguments) == 0
    out, err = capsys.readouterr()
    assert "2 of 2 pictures seen" in out
    assert "--lora" in err


PAGE = Path(__file__).parents[2] / "docs" / "personalize.md"


def commands() -> list[list[str]]:
    """The page's command lines, in order."""
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("safelight ")]


def test_the_page_s_commands_are_real(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every personalisation resolves; every other line parses; what is used was made before."""
    seen, made = 0, {"curio", "dog"}
    for name, *rest in commands():
        if name == "personalize":
            arguments = [str(PAGE.parents[1] / a) if a.endswith(".toml") else a for a in rest]
            recipe = resolved(capsys, *arguments)
            made.add(recipe["output"])
            assert recipe["personal"]["instance_data"].rpartition("/")[2] in made
            seen += 1
            continue
        command: Any = _load(name)
        if hasattr(command, "commands"):
            name, *rest = rest
            command = command.commands[name]
        parameters = command.make_context(name, rest).params
        if name == "generate":
            model = parameters["model"]
            used = [*parameters.get("lora", ()), *parameters.get("embedding", ())]
            assert model == DEFAULT_MODEL or model in made
            assert all(Path(file).parent.name in made for file in used)
    assert seen == 5


def test_the_page_names_every_alias() -> None:
    page = PAGE.read_text(encoding="utf-8")
    spelled_there = {a.replace("_", "-") for a in re.findall(r"`--([a-z_]+)`", page)}
    rare = {"train-data-dir", "lora-alpha", "network-alpha", "network-dim"}
    assert set(ALIASES) - rare <= spelled_there
