"""Sharded training: every process keeps a part of each weight, of its gradient, of its average and
of its moments (FSDP 2; Zhao et al. 2023, 2304.11277; PyTorch's ``fully_shard``).

accelerate shards the network; here is what a run needs beside that. States are whole on disk, in
the layout of a run on one process, so that a run goes on with any number of processes, sharded or
not. A sharded tensor is PyTorch's ``DTensor``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from safelight.errors import InvalidRequest
from safelight.train.recipe import Recipe


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the launcher asked for FSDP, of either version."""
    return accelerator.distributed_type.value == "FSDP"


def check(accelerator: Accelerator, recipe: Recipe) -> None:
    """Refuse, by name, what is not sharded here.

    Raises:
        InvalidRequest: FSDP's first version; another kind of recipe than a UNet's; or an option
            that does not go with shards.
    """
    if not is_sharded(accelerator):
        return
    advice = "Launch without FSDP: recipes/accelerate/multi-node.yaml, or torchrun."
    if not accelerator.is_fsdp2:
        raise InvalidRequest("fsdp_version", "1 is not supported.", "Write fsdp_version: 2.")
    if recipe.kind != "diffusion" or recipe.distill is not None:
        kind = recipe.kind if recipe.distill is None else "distill"
        raise InvalidRequest(kind, "is not trained in shards: only UNets on data are.", advice)
    if recipe.compile:
        raise InvalidRequest("compile", "does not go with FSDP.", "Leave it out.")
    if recipe.optim.kind != "adamw":
        raise InvalidRequest("optim.kind", f"{recipe.optim.kind} does not go with FSDP.", "adamw")


def make_ready(accelerator: Accelerator, module: nn.Module, *, half: bool) -> None:
    """What a network needs before accelerate shards it.

    Weights are laid out in rows: FSDP 2 takes no other layout (channels last among them). In
    bfloat16 the network computes under autocast, as on one process, which keeps norms and sums in
    float32; FSDP's own mixed precision would cast weights and inputs, and is switched off.
    """
    for weight in module.parameters():
        weight.data = weight.data.contiguous()
    if half:
        plugin: Any = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = None
        forward: Any = module.forward

        def autocast(self: nn.Module, x: Tensor, *others: Any, **named: Any) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16):
                return forward.__func__(self, x, *others, **named).float()

        module.forward = MethodType(autocast, module)


def mine(value: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; all of one that is not sharded."""
    to_local = getattr(value, "to_local", None)
    return value if to_local is None else to_local()


def whole(state: Any, *, keep: bool = True) -> Any:
    """A nested state with its sharded tensors gathered, on the CPU.

    Every process of the run has to call it: a part comes from each.

    Args:
        keep: whether this process wants it; others get the structure with ``None`` for those.
    """
    if isinstance(state, Mapping):
        return {name: whole(value, keep=keep) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value, keep=keep) for value in state]
    gather = getattr(state, "full_tensor", None)
    if gather is None:
        return state
    full = gather()
    return full.cpu() if keep else None


def shared_out(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the shards, and in the layout, of another one of its shape.

    The layout matters: fused optimisers walk through weights and moments side by side in memory,
    and weights are channels last in some runs and in rows in others. Every process has the whole:
    nothing is sent. A tensor of another shape, such as a count of steps, stays as it is.
    """
    if value.shape != like.shape:
        return value
    if hasattr(like, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(like, DTensor)
        value = value.to(like.device).contiguous()
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    if value.stride() == like.stride():
        return value
    return torch.empty_like(like, dtype=value.dtype).copy_(value)


def load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill a module, sharded or not, from whole weights."""
    now = module.state_dict()
    module.load_state_dict(
        {k: shared_out(v, now[k]) if k in now else v for k, v in weights.items()}
    )


def shared_out_moments(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimiser, whole, in the shards and the layout of its weights."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        number: {
            name: shared_out(value, weights[number]) if isinstance(value, Tensor) else value
            for name, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    return {**state, "state": moments}
