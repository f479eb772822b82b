"""What a picture keeps of the network's inside from one call to the next.

Block caching: Ma et al. 2024, "DeepCache: Accelerating Diffusion Models for Free", section 3. The
deep features change slowly from step to step, so most calls compute the outer layers alone and read
the rest from the last whole call. Freezing the context: Zhang et al. 2024, "Cross-Attention Makes
Inference Cumbersome in Text-to-Image Diffusion Models" (T-GATE), section 4: late in a run
cross-attention hardly changes, and is what it was at the gate.

A :class:`Memory` belongs to one branch of one picture and holds its rows alone, so pictures of any
mix share calls and none sees another's. Calls that do less are calls of their own.

**Branches** are counted as the skip connections are made: 0 is the output of the first convolution,
and the last layer on the way up reads it; each further one adds a layer on either side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from safelight.nets.unet import DownBlock, UNet
from safelight.spec import UNetSpec

if TYPE_CHECKING:
    from safelight.runtime.attention import CrossAttention, Read

_CENTRE, _POWER = 0.3, 1.4
"""Of ``quadratic``: where the whole calls are closest together, and how much closer; DeepCache's
own for 50 steps of Stable Diffusion (15 of 50, 1.4)."""


@functools.cache
def whole_calls(
    total: int, interval: int, spacing: Literal["uniform", "quadratic"] = "uniform"
) -> frozenset[int]:
    """Which of a run's calls compute everything; the first always does.

    Args:
        interval: one whole call in so many.
        spacing: ``uniform``: evenly; ``quadratic``: as many at most (fewer where two would fall on
            one call), closest together at 0.3 of the run. DeepCache, section 3.4.
    """
    if spacing == "uniform" or interval == 1:
        return frozenset(range(0, total, interval))
    centre = _CENTRE * total
    ends = -(centre ** (1 / _POWER)), (total - centre) ** (1 / _POWER)
    ramp = np.linspace(*ends, -(-total // interval) + 1)[:-1]
    at = np.sign(ramp) * np.abs(ramp) ** _POWER + centre
    return frozenset({0, *(int(v) for v in np.floor(at + 1e-9))})


def branch_count(spec: UNetSpec) -> int:
    """How many skip connections there are to choose from."""
    levels = len(spec.channels)
    return 1 + levels * spec.layers_per_block + levels - 1


@dataclass(eq=False)
class Memory:
    """What one branch of one picture keeps."""

    deep: Tensor | None = None
    """``(1, C, h, w)``: what the last whole call handed to the layer that reads the branch."""
    said: list[Tensor] | None = None
    """``(1, L, C)`` for every cross-attention: what it added at the last call that was watched."""


@dataclass(frozen=True)
class Use:
    """What a row of a network call does with its memory.

    Args:
        branch: of the block cache; None: there is none.
        short: compute the outer layers alone, ``memory.deep`` is there; else write it.
        watch: write ``memory.said``.
        frozen: read ``memory.said`` instead of the context.
    """

    memory: Memory = field(compare=False)
    branch: int | None = None
    short: bool = False
    watch: bool = False
    frozen: bool = False

    @property
    def kind(self) -> object:
        """Rows of one call have the same; None, as for rows without memory, for a whole call."""
        if not (self.short or self.watch or self.frozen):
            return None
        return self.branch if self.short else None, self.watch, self.frozen


@dataclass(frozen=True)
class Saving:
    """What a picture leaves out, by call.

    Args:
        interval, spacing: of the whole calls, see :func:`whole_calls`; 1: all are.
        branch: the skip connection that stays live between them.
        freeze_after: share of the calls after which cross-attention is frozen; 1: never.
    """

    interval: int = 1
    branch: int = 0
    spacing: Literal["uniform", "quadratic"] = "uniform"
    freeze_after: float = 1.0

    def uses(
        self, memories: dict[int, Memory], branches: Sequence[int], index: int, total: int
    ) -> list[Use | None]:
        """For each branch that is asked about, what its row does.

        Args:
            memories: the picture's, by branch; new ones are added.
            index: of the call, of ``total``.
        """
        gate = self.freeze_after * total
        frozen = index >= gate and self._gated(memories, branches)
        watch = index < gate <= index + 1 < total
        # A branch that was not there before (an edited prompt) has nothing to go on with.
        whole = watch or index in whole_calls(total, self.interval, self.spacing)
        found: list[Use | None] = []
        for branch in branches:
            memory = memories.setdefault(branch, Memory())
            cached = self.branch if self.interval > 1 else None
            short = not whole and memory.deep is not None
            found.append(Use(memory, cached, short, watch, frozen))
        return found

    @staticmethod
    def _gated(memories: dict[int, Memory], branches: Sequence[int]) -> bool:
        """Whether every branch has something to be frozen at: the mean of the guided ones, which
        T-GATE goes on with."""
        said = [memory.said for memory in memories.values() if memory.said is not None]
        if not said:
            return False
        mean = said[0]
        if any(other is not mean for other in said):
            mean = [torch.stack(parts).mean(0) for parts in zip(*said, strict=True)]
        for branch in {*memories, *branches}:
            memories.setdefault(branch, Memory()).said = mean
        return True


def taps_of(uses: Sequence[Use | None]) -> dict[int, Tensor | None]:
    """Places whose features a whole call must hand out."""
    return {
        use.branch: None
        for use in uses
        if use is not None and use.branch is not None and not use.short
    }


def keep(uses: Sequence[Use | None], taps: dict[int, Tensor | None]) -> None:
    """Write a whole call's features into its rows' memories."""
    for k, use in enumerate(uses):
        if use is not None and use.branch is not None and not use.short:
            features = taps[use.branch]
            assert features is not None
            # A copy: a view would keep the whole batch alive.
            use.memory.deep = features[k : k + 1].clone(memory_format=torch.preserve_format)


def deep_of(uses: Sequence[Use]) -> Tensor:
    """What a short call starts its way up from."""
    found = [use.memory.deep for use in uses]
    return torch.cat([deep for deep in found if deep is not None])


def first_of(uses: Sequence[Use | None]) -> Use | None:
    """The use whose kind all rows of a call share."""
    return uses[0] if uses and uses[0] is not None and uses[0].kind is not None else None


# -- cross-attention that is watched, or frozen ---------------------------------------------------


class Stand:
    """Stands where a cross-attention expects what to read, and answers for it."""

    def attend(self, cross: CrossAttention, x: Tensor, normed: Tensor) -> Tensor:
        """``x`` plus what the cross-attention says."""
        raise NotImplementedError


class Watch(Stand):
    """Lets it speak, and keeps what it said."""

    def __init__(self, reads: Sequence[Read]) -> None:
        self._reads, self.said = reads, torch.empty(0)

    def attend(self, cross: CrossAttention, x: Tensor, normed: Tensor) -> Tensor:
        out = cross(x, normed, self._reads)
        self.said = out - x
        return out


class Frozen(Stand):
    """Says what was said before."""

    def __init__(self, said: Tensor) -> None:
        self._said = said

    def attend(self, cross: CrossAttention, x: Tensor, normed: Tensor) -> Tensor:
        return x + self._said


def watched(uses: Sequence[Use], watches: Sequence[Watch]) -> None:
    """Write what was said into the rows' memories."""
    for k, use in enumerate(uses):
        use.memory.said = [watch.said[k : k + 1].clone() for watch in watches]


def frozen(uses: Sequence[Use]) -> list[Frozen]:
    """For every cross-attention, what the rows' memories say."""
    every = [use.memory.said or [] for use in uses]
    return [Frozen(torch.cat(parts)) for parts in zip(*every, strict=True)]


# -- the network as it is -------------------------------------------------------------------------


def plain(
    unet: UNet,
    x: Tensor,
    timestep: Tensor,
    context: Tensor,
    vector: Tensor | None,
    guidance: Tensor | None,
    *,
    taps: dict[int, Tensor | None],
    branch: int | None = None,
    deep: Tensor | None = None,
) -> Tensor:
    """:meth:`safelight.nets.unet.UNet.forward`, layer by layer.

    Args:
        taps: filled in: by branch, what was handed to the layer that reads it.
        branch, deep: start the way up there, with that; None: compute everything.
    """
    time = unet.time_vector(timestep, vector, guidance)
    h = unet.conv_in(x)
    skips = [h]
    for layer in _down(unet, time, context):
        if branch is not None and len(skips) > branch:
            break
        h = layer(h)
        skips.append(h)
    h = unet.mid_block(h, time, context) if deep is None else deep
    left, begun = branch_count(unet.spec), deep is None
    for block in unet.up_blocks:
        for k, resnet in enumerate(block.resnets):  # type: ignore[arg-type]
            left -= 1
            begun = begun or left == branch
            if not begun:
                continue
            if left in taps:
                taps[left] = h
            h = resnet(torch.cat([h, skips.pop()], dim=1), time)
            h = h if block.attentions is None else block.attentions[k](h, context)  # type: ignore[index]
        if begun and block.upsamplers is not None:
            h = block.upsamplers[0](h, skips[-1].shape[-2:])  # type: ignore[index]
    return unet.conv_out(F.silu(unet.conv_norm_out(h)))


def _down(unet: UNet, time: Tensor, context: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """What makes the skip connections after the first, one each."""
    for block in unet.down_blocks:
        assert isinstance(block, DownBlock)
        for k, resnet in enumerate(block.resnets):
            attention = None if block.attentions is None else block.attentions[k]

            def layer(h: Tensor, resnet: Any = resnet, attention: Any = attention) -> Tensor:
                h = resnet(h, time)
                return h if attention is None else attention(h, context)

            yield layer
        if block.downsamplers is not None:
            yield block.downsamplers[0]
