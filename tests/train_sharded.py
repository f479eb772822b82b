"""Under torchrun: a UNet trained in shards, and a run that goes on in shards.

accelerate shards on accelerators only. Here its state is told, once it is made, that these
processes on CPUs are such: everything after that is what accelerate does on a cluster.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from bucket_micro import objective
from safelight.train import loop, sharding
from safelight.train.loop import Run
from safelight.train.processes import accelerator_of
from safelight.train.recipe import Recipe


def sharded_accelerator(recipe: Recipe) -> Accelerator:
    AcceleratorState._reset_state()  # runs of several precisions in one process
    accelerator = accelerator_of(recipe)
    plugin = FullyShardedDataParallelPlugin()
    if recipe.precision == "bfloat16":
        plugin.set_mixed_precision("bf16")
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def trained(album: Path, folder: Path) -> dict[str, Any]:
    """A run to its end: its losses, and what every process holds of it at the end.

    One whose folder is called ``half`` computes in bfloat16, and forgets its activations.
    """
    made, losses = objective(album, folder), list[float]()
    if folder.name == "half":
        made.recipe = made.recipe.replace(precision="bfloat16", gradient_checkpointing=True)
    run = Run(made.recipe, made, progress=lambda seen, total, n: losses.append(n["loss"]))
    began = run.seen
    run.go()
    parts = [sharding.mine(p) for p in run.plain.parameters()]
    moments = run.optimizer.state_dict()["state"].values()
    return {
        "began": began,
        "losses": losses,
        "module": sharding.whole(run.plain.state_dict()),
        "ema": sharding.whole(run.ema.state_dict()),
        "held": sum(p.numel() for p in parts),
        "held_average": sum(sharding.mine(p).numel() for p in run.ema.state_dict().values()),
        "held_moments": sum(sharding.mine(m["exp_avg"]).numel() for m in moments),
        "all": sum(p.numel() for p in run.plain.parameters()),
    }


def main() -> None:
    """Arguments: the pictures, and folders of runs to begin or to go on with."""
    album, *folders = map(Path, sys.argv[1:])
    loop.accelerator_of = sharded_accelerator  # type: ignore[attr-defined]
    for folder in folders:
        said = trained(album, folder)
        if torch.distributed.get_rank() == 0:
            torch.save(said, folder / "said.pt")


if __name__ == "__main__":
    main()
