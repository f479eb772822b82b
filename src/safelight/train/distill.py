"""What a teacher adds to the training of a UNet.

* Soft labels beside the data's own (Hinton et al. 2015), and a similarity-based layer match: seed
  004's three stages. Its card names the paper (Lu et al. 2022, 2206.14366) and gives no formula;
  the match here is our reading.
* Guidance distillation (Meng et al. 2023, 2210.03142, section 3.1): one branch instead of two, the
  scale told to the network.
* Latent consistency distillation (Luo et al. 2023, 2310.04378, algorithm 1): from anywhere on the
  teacher's guided path to its start, in one step. The target network is the student itself without
  gradient (Song and Dhariwal 2023, section 3.2), so that there is no second average to keep.

Only the student trains. A teacher is never part of what is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.diffusion import guidance, prediction
from safelight.diffusion.schedule import Schedule
from safelight.errors import InvalidRequest
from safelight.nets.taps import taps, unet_taps
from safelight.nets.unet import UNet
from safelight.runtime.training import hasten
from safelight.train.frozen import load_denoiser
from safelight.train.recipe import DistillRecipe, Recipe
from safelight.train.tasks import Batch, Told, predict

if TYPE_CHECKING:
    from safelight.train.latent import LatentDiffusionObjective

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
"""Of the boundary condition; those that the ``lcm`` solver assumes."""


class Teacher:
    """A frozen UNet that answers in the student's terms."""

    def __init__(
        self, unet: UNet, kind: str, schedule: Schedule, device: torch.device, *, half: bool
    ) -> None:
        self.unet, self.kind, self.schedule, self.half = unet, kind, schedule, half
        unet.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if device.type == "cpu":
            hasten(unet)

    @torch.no_grad()
    def says(self, x: Tensor, t: Tensor, told: Told) -> Tensor:
        """Its prediction, of the kind that the student makes."""
        half = torch.autocast(x.device.type, torch.bfloat16) if self.half else nullcontext()
        with half:
            answer = predict(self.unet, x, t, told._replace(guidance=None)).float()
        return self._in_students_terms(answer, x, t)

    def guided(self, x: Tensor, t: Tensor, told: Told, twin: Told, scale: Tensor) -> Tensor:
        """``u + scale (c - u)``, a scale ``(N,)`` for each picture."""
        weight = scale.reshape(-1, 1, 1, 1)
        return guidance.cfg(self.says(x, t, twin), self.says(x, t, told), weight)  # type: ignore[arg-type]

    def _in_students_terms(self, answer: Tensor, x: Tensor, t: Tensor) -> Tensor:
        abar, wanted = self.schedule.alpha_bar(t), self.schedule.prediction_type
        if self.kind == wanted:
            return answer
        to = {"epsilon": prediction.to_eps, "v": prediction.to_v, "x0": prediction.to_x0}[wanted]
        return to(answer, x, abar, self.kind)


class Lesson(Protocol):
    """One kind of distillation."""

    def error(
        self, objective: LatentDiffusionObjective, module: nn.Module, batch: Batch
    ) -> tuple[Tensor, Mapping[str, float]]:
        """The loss of each picture ``(N,)``, and numbers worth a log line."""
        ...


class Labels:
    """``hard * loss + soft * |student - teacher|² + match * layer match``."""

    def __init__(self, settings: DistillRecipe, student: UNet, teacher: Teacher) -> None:
        self.settings, self.student, self.teacher = settings, student, teacher

    def error(
        self, objective: LatentDiffusionObjective, module: nn.Module, batch: Batch
    ) -> tuple[Tensor, Mapping[str, float]]:
        s, soft = self.settings, []
        student, teacher = layers_of(self.student), layers_of(self.teacher.unet)
        flat = [[name for block in part.values() for name in block] for part in (student, teacher)]
        if not s.match:
            flat = [[], []]
        with taps(self.student, flat[0]) as mine, taps(self.teacher.unet, flat[1]) as theirs:

            def answer(x: Tensor, t: Tensor) -> Tensor:
                said = predict(module, x, t, batch.told)
                wanted = self.teacher.says(x, t, batch.told)
                soft.append((said.float() - wanted).square().flatten(1).mean(1))
                return said

            hard = objective.error(module, batch, answer=answer)
        total = s.hard * hard + s.soft * soft[0]
        logged = {"hard": float(hard.detach().mean()), "soft": float(soft[0].detach().mean())}
        if s.match:
            match = layer_match(mine, theirs, student, teacher)
            total, logged["match"] = total + s.match * match, float(match.detach())
        return total, logged


class Guided:
    """The teacher's guided prediction, in one call that is told the scale."""

    def __init__(self, settings: DistillRecipe, student: UNet, teacher: Teacher) -> None:
        _needs_scale(student)
        self.settings, self.width = settings, student.spec.guidance_embedding_size
        self.teacher = teacher

    def error(
        self, objective: LatentDiffusionObjective, module: nn.Module, batch: Batch
    ) -> tuple[Tensor, Mapping[str, float]]:
        scale, told = _scaled(batch, self.settings, self.width)
        abar = objective.schedule.alpha_bar(batch.t)
        x = prediction.noised(batch.latents, batch.seen_noise, abar).to(batch.latents.dtype)
        twin = objective.task.twin(batch.told)
        wanted = self.teacher.guided(x, batch.t, batch.told, twin, scale)
        said = predict(module, x, batch.t, told).float()
        return (said - wanted).square().flatten(1).mean(1), {}


class Consistency:
    """Neighbours on the teacher's guided DDIM path are to lead to the same start."""

    def __init__(self, settings: DistillRecipe, student: UNet, teacher: Teacher) -> None:
        _needs_scale(student)
        self.settings, self.width = settings, student.spec.guidance_embedding_size
        self.student, self.teacher = student, teacher

    def error(
        self, objective: LatentDiffusionObjective, module: nn.Module, batch: Batch
    ) -> tuple[Tensor, Mapping[str, float]]:
        schedule, s = objective.schedule, self.settings
        scale, told = _scaled(batch, s, self.width)
        t, t_next = neighbours(batch.t, schedule.steps, s.grid)
        abar, abar_next = schedule.alpha_bar(t), schedule.alpha_bar(t_next)
        x = prediction.noised(batch.latents, batch.seen_noise, abar).to(batch.latents.dtype)
        twin = objective.task.twin(batch.told)
        guided = self.teacher.guided(x, t, batch.told, twin, scale)
        kind = schedule.prediction_type
        clean = prediction.to_x0(guided, x, abar, kind)
        x_next = prediction.noised(clean, prediction.to_eps(guided, x, abar, kind), abar_next)
        made = starts(module, x, t, told, schedule)
        with torch.no_grad():
            wanted = starts(self.student, x_next.to(x), t_next, told, schedule)
        bend = s.huber
        distance = ((made - wanted).square() + bend**2).sqrt() - bend
        return distance.flatten(1).mean(1), {}


def lesson(recipe: Recipe, student: UNet, schedule: Schedule, device: torch.device) -> Lesson:
    """What ``recipe.distill`` asks for.

    Raises:
        InvalidRequest: the student cannot be told a guidance scale, and would have to be.
    """
    settings = recipe.distill
    assert settings is not None
    unet, spec = load_denoiser(settings.teacher)
    half = recipe.precision == "bfloat16"
    teacher = Teacher(unet, spec.prediction_type, schedule, device, half=half)
    kinds: dict[str, Any] = {"labels": Labels, "guidance": Guided, "consistency": Consistency}
    return kinds[settings.kind](settings, student, teacher)


def _needs_scale(student: UNet) -> None:
    if not student.spec.guidance_embedding_size:
        raise InvalidRequest(
            "diffusion.unet.guidance_embedding_size",
            "0: the student cannot be told its guidance scale.",
            "Write 256, as published students have.",
        )


def _scaled(batch: Batch, settings: DistillRecipe, width: int) -> tuple[Tensor, Told]:
    low, high = settings.guidance
    scale = low + (high - low) * batch.scale
    return scale, batch.told._replace(guidance=guidance.guidance_embedding(scale, width))


# -- consistency -------------------------------------------------------------------------------


def neighbours(t: Tensor, steps: int, grid: int) -> tuple[Tensor, Tensor]:
    """The timesteps of a DDIM path of ``grid`` steps around any timestep: the noisier, the next.

    The last goes to timestep 0.
    """
    stride = steps // grid
    place = t * grid // steps
    return (place + 1) * stride - 1, (place * stride - 1).clamp(min=0)


def starts(module: nn.Module, x: Tensor, t: Tensor, told: Told, schedule: Schedule) -> Tensor:
    """Where the path through ``x`` at ``t`` starts, as the student says: ``c_skip x + c_out x0``.

    At ``t = 0`` that is ``x`` itself (Song et al. 2023, equation 5).
    """
    said = predict(module, x, t, told)
    x0 = prediction.to_x0(said, x, schedule.alpha_bar(t), schedule.prediction_type)
    scaled = (t.float() * TIMESTEP_SCALING).reshape(-1, 1, 1, 1)
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
    return c_skip * prediction.working(x) + c_out * x0


# -- layers ------------------------------------------------------------------------------------


def layers_of(unet: UNet) -> dict[str, list[str]]:
    """Names of what a UNet's blocks and their layers put out, by block, in order."""
    blocks: dict[str, list[str]] = {}
    for name in unet_taps(unet.spec, layers=True):
        parts = name.split(".")
        if parts[0] in ("down_blocks", "up_blocks"):
            blocks.setdefault(".".join(parts[:2]), []).append(name)
        elif parts[0] == "mid_block":
            blocks.setdefault("mid_block", []).append(name)
    return blocks


def layer_match(
    mine: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    student: Mapping[str, list[str]],
    teacher: Mapping[str, list[str]],
) -> Tensor:
    """The mean distance of every student layer to the teacher's most similar one in its block.

    Which that is, is found anew in every batch, from pooled features, without gradient.
    """
    distances = []
    for block, names in student.items():
        for name in names:
            a = mine[name]
            there = [theirs[n].detach() for n in teacher.get(block, [])]
            there = [b for b in there if b.shape[-2:] == a.shape[-2:]]
            if there:
                alike = torch.stack([similarity(a.detach(), b) for b in there])
                distances.append(distance(a, there[int(alike.argmax())]))
    if not distances:
        raise InvalidRequest("distill.match", "student and teacher have no block in common.")
    return torch.stack(distances).mean()


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Of two layers' outputs on the same batch, at most 1.

    The cosine of features that were averaged over space and centred over channels; where the
    numbers of channels differ, the cosine of how alike places are (:func:`relations`).
    """
    if a.shape[1] != b.shape[1]:
        return F.cosine_similarity(relations(a).flatten(), relations(b).flatten(), dim=0)
    pooled = [x.float().mean((2, 3)) for x in (a, b)]
    a, b = (x - x.mean(1, keepdim=True) for x in pooled)
    return F.cosine_similarity(a.flatten(), b.flatten(), dim=0)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance of unit feature vectors, ``2 - 2 cos``; of :func:`relations` where
    the numbers of channels differ."""
    if a.shape[1] != b.shape[1]:
        return (relations(a) - relations(b)).square().mean()
    a, b = (F.normalize(x.float(), dim=1) for x in (a, b))
    return (a - b).square().sum(1).mean()


def relations(x: Tensor) -> Tensor:
    """How alike the places of each picture are: cosines ``(N, hw, hw)`` of their features
    (similarity-preserving distillation, Tung and Mori 2019)."""
    places = F.normalize(x.float().flatten(2), dim=1)
    return places.transpose(1, 2) @ places
