"""Training in shards: the same curve, a part of everything on each process, one kind of file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from bucket_micro import fields, make_album, objective
from safelight.errors import InvalidRequest, SafelightError
from safelight.nets import attention, layers
from safelight.train import sharding
from safelight.train.loop import Run
from safelight.train.processes import check_agreement
from safelight.train.recipe import Recipe

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"


def launched(config: Path) -> dict[str, str]:
    """What ``accelerate launch`` tells its processes through the environment."""
    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(config), "--no_python", "safelight"])
    arguments, _, _ = _validate_launch_command(arguments)
    return {k: v for k, v in prepare_multi_gpu_env(arguments).items() if k not in os.environ}


def test_the_launchers_files_say_what_their_comments_say(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as on their clusters
    shards = launched(CONFIGS / "fsdp.yaml")
    assert (shards["ACCELERATE_USE_FSDP"], shards["FSDP_VERSION"]) == ("true", "2")
    for name in shards["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(","):
        assert hasattr(layers, name) or hasattr(attention, name), name
    node: Any = load_config_from_file(str(CONFIGS / "fsdp.yaml"))
    assert node.num_processes == 8
    cluster: Any = load_config_from_file(str(CONFIGS / "multi-node.yaml"))
    assert (cluster.num_machines, cluster.num_processes) == (32, 32 * 8)
    assert "ACCELERATE_USE_FSDP" not in launched(CONFIGS / "multi-node.yaml")


def test_shards_give_the_curve_of_one_process_and_go_on_from_its_file(tmp_path: Path) -> None:
    album, losses = make_album(tmp_path / "album"), list[float]()
    made = objective(album, tmp_path / "one")
    one = Run(made.recipe, made, progress=lambda seen, total, n: losses.append(n["loss"]))
    one.go()
    killed = tmp_path / "killed"  # a run of one process that was killed after 48 pictures
    shutil.copytree(tmp_path / "one", killed)
    sorted(killed.glob("checkpoint-*.pt"))[-1].unlink()
    shutil.copytree(killed, tmp_path / "half")

    (tmp_path / "two").mkdir()
    script = str(ROOT / "tests" / "train_sharded.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    runs = [str(tmp_path / name) for name in ("two", "killed", "half")]
    environment = {**os.environ, **launched(CONFIGS / "fsdp.yaml"), "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launch, "2", script, str(album), *runs], check=True, timeout=540,
                   env=environment)  # fmt: skip

    for folder, began in (("two", 0), ("killed", 48)):
        said = torch.load(tmp_path / folder / "said.pt", weights_only=True)
        assert said["began"] == began
        assert said["losses"] == pytest.approx(losses[began // 4 :], rel=1e-4)
        for kind, mine in (("module", one.plain), ("ema", one.ema)):
            for name, value in mine.state_dict().items():
                torch.testing.assert_close(said[kind][name], value, rtol=1e-3, atol=2e-5)
        for held in ("held", "held_average", "held_moments"):
            assert 0.4 < said[held] / said["all"] < 0.65, held
    half = torch.load(tmp_path / "half" / "said.pt", weights_only=True)["losses"]
    assert half != pytest.approx(losses[12:], rel=1e-5), "bfloat16 rounds"
    assert half == pytest.approx(losses[12:], rel=0.02)
    sorted((tmp_path / "two").glob("checkpoint-*.pt"))[-1].unlink()
    made = objective(album, tmp_path / "two")
    back = Run(made.recipe, made)  # from the file of the shards, on one process
    assert back.seen == 48
    back.go()
    for name, value in one.plain.state_dict().items():
        torch.testing.assert_close(back.plain.state_dict()[name], value, rtol=1e-3, atol=2e-5)
    manifest = json.loads((tmp_path / "killed" / "manifest.json").read_text())
    assert manifest["images"] == 64


@pytest.mark.parametrize(
    ("version", "changes", "named"),
    [
        (1, {}, "fsdp_version"),
        (2, {"diffusion": None, "data": {}, "vae": {"vae": {"channels": [8, 8]}}}, "vae"),
        (2, {"distill": {"teacher": "t"}}, "distill"),
        (2, {"optim": {"kind": "adamw8bit"}}, "optim.kind"),
        (2, {"compile": True, "data": {}}, "compile"),
    ],
)
def test_what_is_not_trained_in_shards_is_refused_by_name(
    version: int, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate({**fields(tmp_path, tmp_path), **changes})
    accelerator: Any = SimpleNamespace(
        distributed_type=SimpleNamespace(value="FSDP"), is_fsdp2=version == 2
    )
    with pytest.raises(InvalidRequest) as caught:
        sharding.check(accelerator, recipe)
    assert caught.value.field == named
    alone: Any = SimpleNamespace(distributed_type=SimpleNamespace(value="NO"), is_fsdp2=False)
    sharding.check(alone, recipe)


def test_nodes_that_do_not_share_their_folder_are_told(tmp_path: Path) -> None:
    accelerator: Any = SimpleNamespace(
        num_processes=2, device="cpu", gather=lambda mine: torch.cat([mine, mine + 48])
    )
    with pytest.raises(SafelightError, match="storage that all nodes share"):
        check_agreement(accelerator, 0, tmp_path)
