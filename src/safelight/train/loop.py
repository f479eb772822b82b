"""The one training loop.

Progress is counted in pictures. Everything random in a batch is keyed by (run seed, index of the
picture in the run), so a run that was interrupted continues as if it had not been: run the same
command again. A step sees the same pictures however many processes share it.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from safelight.errors import InvalidRequest
from safelight.runtime.training import hasten
from safelight.train import checkpoint, manifest, sharding
from safelight.train.ema import EMA
from safelight.train.processes import accelerator_of, check_agreement
from safelight.train.recipe import OptimRecipe, Recipe
from safelight.train.remember import forget_activations

log = logging.getLogger(__name__)


class Objective(Protocol):
    """What a stage trains: its module, its batches, its loss."""

    module: nn.Module

    def data_digest(self) -> str:
        """Stands for the pictures of the run, in its manifest."""
        ...

    def data_report(self) -> Mapping[str, Any]:
        """Pictures and captions that could not be used, counted and listed; or nothing."""
        ...

    def batch(self, start: int, count: int) -> Any:
        """Pictures ``start`` to ``start + count`` of the run, ready for :meth:`loss`."""
        ...

    def loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        """The loss to descend, and numbers worth a log line."""
        ...

    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """Numbers on held-out pictures."""
        ...

    def sample(self, module: nn.Module, path: Path) -> None:
        """Write a grid that shows how far the stage is."""
        ...

    def export(self, module: nn.Module, folder: Path) -> None:
        """Write the trained part as a folder that later stages read."""
        ...


def learning_rate(optim: OptimRecipe, seen: int, total: int) -> float:
    """The rate after ``seen`` of ``total`` pictures: warm-up, constant, decay."""
    rate = optim.lr
    if seen < optim.warmup:
        return rate * (seen + 1) / optim.warmup
    start = total * (1 - optim.decay)
    if optim.decay and seen > start:
        left = max(0.0, (total - seen) / (total - start))
        return rate * (
            left if optim.decay_shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
        )
    return rate


def adamw(module: nn.Module, optim: OptimRecipe) -> torch.optim.Optimizer:
    """AdamW over the weights of a module that train.

    Raises:
        InvalidRequest: 8-bit moments were asked for, and bitsandbytes is not installed.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise InvalidRequest("recipe", "leaves no weight to train.")
    options: Any = {"lr": optim.lr, "betas": optim.betas, "weight_decay": optim.weight_decay}
    if optim.kind == "adamw":
        return torch.optim.AdamW(trainable, fused=True, **options)
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
    except ImportError:
        raise InvalidRequest(
            "optim.kind", "adamw8bit needs bitsandbytes.", "pip install bitsandbytes, or adamw."
        ) from None
    return AdamW8bit(trainable, **options)


class Run:
    """One training run: recipe, objective, and where it is.

    Args:
        progress: called after every step with (pictures seen, total, numbers).
        stop_after: seconds after which to checkpoint and stop, for machines on loan.
    """

    def __init__(
        self,
        recipe: Recipe,
        objective: Objective,
        *,
        progress: Any = None,
        stop_after: float | None = None,
    ) -> None:
        self.recipe, self.objective, self.progress = recipe, objective, progress
        self.stop_after = stop_after
        self.accelerator = accelerator_of(recipe)
        sharding.check(self.accelerator, recipe)
        self.batch, batches = recipe.share(self.accelerator.num_processes)
        self.accelerator.gradient_accumulation_steps = batches
        module = objective.module
        if self.accelerator.device.type == "cpu":
            hasten(module, kernels=not recipe.compile)
        if recipe.gradient_checkpointing:
            forget_activations(module)
        optimizer = adamw(module, recipe.optim)
        self._whole: nn.Module | None = None
        if sharding.is_sharded(self.accelerator):  # shards cannot be copied: samples need a whole
            self._whole = copy.deepcopy(module) if self._main else None
            half = recipe.precision == "bfloat16"
            sharding.make_ready(self.accelerator, module, half=half)
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)
        self._trained: Any = torch.compile(self.module) if recipe.compile else self.module
        width = recipe.ema.width if recipe.ema.kind == "power" else None
        self.ema = EMA(self.plain, recipe.ema.decay, width=width)
        self.seen, self.seconds = 0, 0.0
        self._began, self._stopping = time.monotonic(), False
        self.folder = recipe.output
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    @property
    def plain(self) -> nn.Module:
        """The module without accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.module)

    def go(self) -> dict[str, float]:
        """Train to the end; returns the last validation numbers."""
        from torch.utils.tensorboard import SummaryWriter

        recipe, total = self.recipe, self.recipe.images
        board = SummaryWriter(str(self.folder / "tensorboard")) if self._main else None
        self._began, started_at = time.monotonic(), self.seconds
        numbers: dict[str, float] = {}
        while self.seen < total:
            loss, logged = self._step()
            self.seconds = started_at + time.monotonic() - self._began
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} after {self.seen} pictures; the last checkpoint in "
                    f"{self.folder} is intact. Lower optim.lr or raise optim.warmup."
                )
            if board is not None and self._due(1024):
                for key, value in {"loss": loss, **logged}.items():
                    board.add_scalar(f"train/{key}", value, self.seen)
            if self.progress is not None:
                self.progress(self.seen, total, {"loss": loss, **logged})
            last = self.seen >= total or self._stopping
            if last or self._due(recipe.save_every):
                self._save()
            if last or self._due(recipe.sample_every):
                numbers = self._show(board)
            if self._stopping:
                break
        averaged = self._averaged()
        if averaged is not None:
            self.objective.export(averaged, self.folder)
            self._describe()
        return numbers

    def _step(self) -> tuple[float, Mapping[str, float]]:
        recipe, optim = self.recipe, self.recipe.optim
        rate = learning_rate(optim, self.seen, recipe.images)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        batches = self.accelerator.gradient_accumulation_steps
        total, sums = torch.zeros((), device=self.accelerator.device), dict[str, float]()
        for k in range(batches):
            with self.accelerator.accumulate(self.module):
                start = self.seen + (k * world + rank) * self.batch
                batch = self.objective.batch(start, self.batch)
                loss, logged = self.objective.loss(self._trained, batch)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.module.parameters(), optim.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss.detach().float() / batches
            for name, value in logged.items():
                sums[name] = sums.get(name, 0.0) + value / batches
        self.seen += optim.step
        self.ema.update(self.plain)
        return self._agreed(total), {**sums, "lr": rate}

    def _agreed(self, loss: Tensor) -> float:
        """The loss of all processes. When the time of one is up, all of them stop."""
        late = self.stop_after is not None and time.monotonic() - self._began > self.stop_after
        said: Any = torch.stack([loss, torch.full_like(loss, late)])
        if self.accelerator.num_processes > 1:
            said = self.accelerator.reduce(said, "mean")
        self._stopping = float(said[1]) > 0
        return float(said[0])

    # -- checkpoints ---------------------------------------------------------------------------

    @property
    def _main(self) -> bool:
        return self.accelerator.is_main_process

    def _due(self, every: int) -> bool:
        return self.seen // every != (self.seen - self.recipe.optim.step) // every

    def _save(self) -> None:
        state = sharding.whole(
            {
                "module": self.plain.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
            keep=self._main,
        )
        if self._main:
            state |= {"updates": self.ema.updates, "seen": self.seen, "seconds": self.seconds}
            checkpoint.save(self.folder, self.seen, state, keep=self.recipe.keep)
            self._describe()

    def _resume(self) -> None:
        state = checkpoint.newest(self.folder)
        if state is not None:
            sharding.load(self.plain, state["module"])
            self.ema.load(state["ema"], state["updates"])
            moments = sharding.shared_out_moments(state["optimizer"], self.optimizer)
            self.optimizer.load_state_dict(moments)
            self.seen, self.seconds = state["seen"], state["seconds"]
            log.info("resuming %s at %d pictures", self.recipe.name, self.seen)
        check_agreement(self.accelerator, self.seen, self.folder)
        if self._main:
            _forget_later(self.folder / "log.jsonl", self.seen)

    def _describe(self) -> None:
        """The manifest of the run so far."""
        record = manifest.manifest(
            self.recipe,
            seen=self.seen,
            seconds=self.seconds,
            processes=self.accelerator.num_processes,
            data_digest=self.objective.data_digest(),
        )
        manifest.write(self.folder, record)
        skipped = self.objective.data_report()
        if skipped:
            manifest.write(self.folder, dict(skipped), "data.json")

    def _averaged(self) -> nn.Module | None:
        """The module with its averaged weights, in evaluation mode, beside the trained one; for
        the first process. All have to ask for it: each may hold a part."""
        weights = sharding.whole(self.ema.state_dict(), keep=self._main)
        if not self._main:
            return None
        twin = copy.deepcopy(self._whole or self.plain).to(self.accelerator.device)
        twin.load_state_dict(weights)
        return twin.eval()

    def _show(self, board: Any) -> dict[str, float]:
        averaged = self._averaged()
        if averaged is None:
            return {}
        with torch.no_grad():
            numbers = dict(self.objective.validate(averaged))
            self.objective.sample(averaged, self.folder / f"samples-{self.seen:08d}.png")
        self.objective.export(averaged, self.folder)
        for key, value in numbers.items():
            board.add_scalar(f"val/{key}", value, self.seen)
        record = {"seen": self.seen, "seconds": round(self.seconds, 1), **numbers}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        log.info("%s: %s", self.recipe.name, record)
        return numbers


def _forget_later(path: Path, seen: int) -> None:
    """Drop what a killed run logged after its last checkpoint; it will be logged again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["seen"] <= seen:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # the line that was being written
    part = path.with_suffix(".part")
    part.write_text("".join(kept))
    part.replace(path)
