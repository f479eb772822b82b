"""The two ways in, on micro networks: the quick look at a run's folder, and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from safelight import presets
from safelight.data import stilllife
from safelight.evaluate import prompts, quick
from safelight.evaluate.sampling import sampler
from safelight.nets.clip import TextTower, VisionTower
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.parts import load_text, load_unet, load_vae
from safelight.spec import ScheduleSpec, TextSpec, UNetSpec, VAESpec, VisionSpec
from safelight.store.weights import save_safetensors
from safelight.text.tokenizer import Tokenizer, learn_vocabulary


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a random UNet, autoencoder and CLIP."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    vocab, merges = learn_vocabulary(stilllife.all_captions_corpus(50), 10)
    Tokenizer.from_vocab(vocab, merges, context_length=32).save(folder / "tokenizer")
    n = len(vocab)
    tower = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 16}
    parts = {
        "text": TextTower(
            TextSpec(
                vocab_size=n, context_length=32, bos_id=n - 2, eos_id=n - 1, pad_id=n - 1, **tower
            )
        ),
        "vision": VisionTower(VisionSpec(image_size=32, patch_size=8, projection_width=8, **tower)),
        "vae": VAE(VAESpec(channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=4)),
        "unet": UNet(
            UNetSpec(
                sample_size=8,
                channels=(16, 16),
                attention=(True, False),
                heads=(2, 2),
                only_cross_attention=(False, False),
                layers_per_block=1,
                context_width=16,
                norm_groups=4,
            )
        ),
    }
    for name, net in parts.items():
        save_safetensors(folder / f"{name}.safetensors", net.state_dict())
        (folder / f"{name}.json").write_text(net.spec.model_dump_json())
    (folder / "schedule.json").write_text(ScheduleSpec().model_dump_json())
    return folder


def test_a_picture_is_the_same_alone_and_in_a_batch(run: Path) -> None:
    unet, schedule = load_unet(run)
    generate = sampler(unet, schedule, *load_text(run), load_vae(run), steps=3)
    chosen = prompts.load("tuning", 3)
    together = generate([p.text for p in chosen], [p.seed for p in chosen])
    assert together.shape == (3, 64, 64, 3)
    for prompt, picture in zip(chosen, together, strict=True):
        alone = generate([prompt.text], [prompt.seed])[0]
        assert np.abs(alone.astype(int) - picture).max() <= 1
    assert np.abs(generate(["a cone"], [1]).astype(int) - generate(["a cone"], [2])).max() > 1


def test_a_quick_look_prints_the_parts_and_writes_the_report(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ["--unet", str(run), "--clip", str(run), "--vae", str(run)]
    quick.main([*folders, "--n", "3", "--steps", "2", "--ceilings", "-o", str(tmp_path)])
    out = capsys.readouterr().out
    parts = json.loads(out.splitlines()[0])
    assert parts["n"] == 3
    assert "all" in parts
    assert "**tuning**, 3 prompts" in out
    assert "Fréchet" in out
    assert (tmp_path / "guidance-3" / "scores.json").exists()


class RealRenders:
    """Stands for a generator: answers prompts of the lists with renders of their scenes."""

    def __init__(self, run: Path) -> None:
        self.model = SimpleNamespace(vae=load_vae(run), vision=None, prior=None, spec=presets.TINY)
        self.scales: list[float | None] = []
        self.scenes = {
            (p.text, p.seed): p.scene() for name in prompts.DIGESTS for p in prompts.load(name, 8)
        }

    def generate(
        self, prompt: list[str], *, seed: Sequence[int], count: int, steps: int, sampler: str,
        guidance_scale: float | None = None,
    ) -> list[SimpleNamespace]:  # fmt: skip
        assert count == 1
        self.scales.append(guidance_scale)
        wanted = [self.scenes[key] for key in zip(prompt, seed, strict=True)]
        if guidance_scale == 9.0:  # a bad one
            wanted = [stilllife.mirror(s) for s in wanted]
        return [
            SimpleNamespace(image=Image.fromarray(p), message="")
            for p in stilllife.render(wanted, 64)
        ]


@pytest.fixture
def command(run: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    import typer

    import safelight
    from safelight.cli import evaluate

    generator = RealRenders(run)
    monkeypatch.setattr(safelight, "load", lambda name: generator, raising=False)
    app = typer.Typer(add_completion=False)
    app.command()(evaluate.command)

    def call(*arguments: str):  # type: ignore[no-untyped-def]
        return CliRunner().invoke(app, list(arguments)), generator

    return call


def test_the_command_scores_the_lists(command, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    arguments = ["--list", "seen,single", "--limit", "6", "-o", str(tmp_path), "--no-ceilings"]
    result, generator = command(*arguments)
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "scores.json").read_text())
    assert set(numbers["lists"]) == {"seen", "single"}
    assert numbers["lists"]["seen"]["generated"]["all"]["right"] >= 5
    assert generator.scales == [None, None]


def test_a_sweep_chooses_on_the_tuning_list(command, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    arguments = ["--list", "held_out", "--limit", "8", "-o", str(tmp_path), "--no-ceilings"]
    result, generator = command(*arguments, "--sweep", "3,9")
    assert result.exit_code == 0, result.output
    assert "| 3 (chosen on tuning) |" in (tmp_path / "sweep.md").read_text()
    assert generator.scales == [3.0, 9.0, 3.0, 9.0]


@pytest.mark.parametrize(
    "arguments",
    [["--list", "horses"], ["--list", ","], ["--sweep", "a,b"], ["--sweep", "-1"],
     ["--sweep", "1,2", "--guidance-scale", "3"]],
)  # fmt: skip
def test_a_wrong_argument_is_refused_before_anything_is_loaded(  # type: ignore[no-untyped-def]
    command, arguments: list[str]
) -> None:
    from safelight.errors import InvalidRequest

    result, generator = command(*arguments)
    assert isinstance(result.exception, InvalidRequest)
    assert not generator.scales
