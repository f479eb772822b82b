"""Teachers: what is cut from them, what they add to a loss, and that they never learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from safelight.diffusion import grid, guidance, prediction, solvers
from safelight.diffusion.schedule import Schedule
from safelight.errors import InvalidRequest
from safelight.nets.unet import UNet
from safelight.spec import ScheduleSpec, UNetSpec
from safelight.train import distill
from safelight.train.latent import LatentDiffusionObjective
from safelight.train.recipe import Recipe
from safelight.train.rehearsal import WIDTH, RandomPictures, _written, small_parts
from safelight.train.tasks import Told
from safelight.train.warm import teacher_key, warm_start

TEACHER = UNetSpec(
    sample_size=4,
    channels=(8, 16, 16, 16),
    attention=(True, True, True, False),
    heads=(2, 2, 2, 2),
    context_width=WIDTH,
    norm_groups=4,
)
STUDENT = TEACHER.replace(layers_per_block=1)
"""Four levels, widths that differ: where a wrong layer would not fit."""
SHALLOW: dict[str, Any] = {
    "sample_size": 4,
    "channels": (8, 8),
    "attention": (True, True),
    "heads": (2, 2),
    "only_cross_attention": (False, False),
    "context_width": WIDTH,
    "norm_groups": 4,
}


def taught(folder: Path, settings: dict[str, Any], unet: dict[str, Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        parts = small_parts(32, 8)
        teacher = folder / "teacher"
        if not teacher.exists():
            _written(UNetSpec(**SHALLOW, layers_per_block=2), "v", teacher)
    recipe = Recipe.model_validate(
        {
            "name": "student",
            "output": folder / "out",
            "images": 64,
            "data": {"size": 32},
            "optim": {"batch": 4, "lr": 1e-3},
            "diffusion": {
                "unet": {**SHALLOW, "layers_per_block": 1, **unet},
                "prediction_type": "v",
                "clip": "none",
                "vae": "none",
            },
            "distill": {"teacher": teacher, **settings},
        }
    )
    made = LatentDiffusionObjective(recipe, frozen=parts, pictures=RandomPictures(32))
    torch.nn.init.normal_(made.module.conv_out.weight, std=0.1)
    return made


def test_a_student_takes_the_first_layers_and_the_last_skip() -> None:
    assert teacher_key("up_blocks.2.resnets.1.conv1.weight", STUDENT, TEACHER) == (
        "up_blocks.2.resnets.2.conv1.weight"
    )
    assert teacher_key("down_blocks.1.attentions.0.norm.weight", STUDENT, TEACHER) == (
        "down_blocks.1.attentions.0.norm.weight"
    )
    teacher, student = UNet(TEACHER), UNet(STUDENT)
    warm_start(student, teacher.state_dict(), TEACHER)
    mine, theirs = student.state_dict(), teacher.state_dict()
    for key, value in mine.items():
        assert torch.equal(value, theirs[teacher_key(key, STUDENT, TEACHER)])
    # The middle layer of the way up would not fit: its skip has another width.
    wrong = theirs["up_blocks.2.resnets.1.conv1.weight"].shape
    assert mine["up_blocks.2.resnets.1.conv1.weight"].shape != wrong


def test_the_published_student_has_the_published_count() -> None:
    from safelight import presets

    with torch.device("meta"):
        small, full = UNet(presets.SD_SMALL.unet), UNet(presets.SD_V1.unet)
    assert sum(p.numel() for p in small.parameters()) == 579_384_964
    theirs = full.state_dict()
    for key, value in small.state_dict().items():
        old = theirs[teacher_key(key, presets.SD_SMALL.unet, presets.SD_V1.unet)]
        assert old.shape == value.shape, key


def test_new_inputs_start_silent() -> None:
    old = UNet(UNetSpec(**SHALLOW, layers_per_block=1))
    wide = UNet(
        UNetSpec(
            **SHALLOW,
            layers_per_block=1,
            in_channels=9,
            class_embedding="projection",
            class_embedding_size=6,
            guidance_embedding_size=8,
        )
    )
    warm_start(wide, old.state_dict(), old.spec)
    x, t, c = torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), torch.randn(2, 5, WIDTH)
    planes = torch.cat([x, torch.randn(2, 5, 4, 4)], dim=1)
    made = wide(planes, t, c, torch.randn(2, 6), torch.randn(2, 8))
    torch.testing.assert_close(made, old(x, t, c), rtol=1e-4, atol=1e-5)
    narrow = UNet(UNetSpec(**{**SHALLOW, "channels": (4, 4)}, layers_per_block=1))
    with pytest.raises(InvalidRequest, match=r"start: conv_in\.weight is 4x4x3x3"):
        warm_start(narrow, old.state_dict(), old.spec)


def test_labels_are_hard_and_soft(tmp_path: Path) -> None:
    made = taught(tmp_path, {"soft": 0.5, "hard": 0.5}, {})
    batch = made.batch(0, 4)
    loss, logged = made.loss(made.module, batch)
    abar = made.schedule.alpha_bar(batch.t)
    x = prediction.noised(batch.latents, batch.noise, abar).float()
    said = made.module(x, batch.t, batch.told.tokens)
    teacher = made.lesson.teacher.unet(x, batch.t, batch.told.tokens)
    hard = (said - prediction.target("v", batch.latents, batch.noise, abar)).square().mean()
    soft = (said - teacher).square().mean()
    assert float(loss.detach()) == pytest.approx(
        float((0.5 * hard + 0.5 * soft).detach()), rel=1e-4
    )
    assert logged["soft"] == pytest.approx(float(soft.detach()), rel=1e-4)


def test_a_teacher_of_another_kind_is_translated(tmp_path: Path) -> None:
    made = taught(tmp_path, {}, {})
    batch = made.batch(0, 4)
    teacher = made.lesson.teacher
    v = teacher.says(batch.latents, batch.t, batch.told)
    abar = made.schedule.alpha_bar(batch.t)
    # The same network, read as an epsilon model that says what v implies.
    eps = prediction.to_eps(v, batch.latents, abar, "v")
    teacher.kind, unet = "epsilon", teacher.unet
    teacher.unet = lambda *_args, **_named: eps
    torch.testing.assert_close(
        teacher.says(batch.latents, batch.t, batch.told), v, rtol=1e-3, atol=1e-4
    )
    teacher.unet = unet


def test_only_the_student_trains(tmp_path: Path) -> None:
    made = taught(tmp_path, {"match": 0.1}, {})
    frozen = [made.lesson.teacher.unet, made.frozen.text, made.frozen.vae]
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in frozen]
    assert not any(p.requires_grad for net in frozen for p in net.parameters())
    optimizer = torch.optim.AdamW(made.module.parameters(), lr=1e-2)
    first = made.module.conv_in.weight.detach().clone()
    for step in range(2):
        loss, logged = made.loss(made.module, made.batch(4 * step, 4))
        loss.backward()
        optimizer.step()
    assert logged["match"] > 0
    assert not torch.equal(first, made.module.conv_in.weight)
    for net, old in zip(frozen, before, strict=True):
        assert all(p.grad is None for p in net.parameters())
        assert all(torch.equal(v, old[k]) for k, v in net.state_dict().items())


def test_layers_are_matched_by_likeness() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 6, 3, 3, generator=rng) for _ in range(2))
    names = {"mid_block": ["x"]}, {"mid_block": ["p", "q"]}
    theirs = {"p": b, "q": 3 * a}  # q is a, up to scale
    assert float(distill.layer_match({"x": a}, theirs, *names)) == pytest.approx(0, abs=1e-6)
    theirs = {"p": b, "q": torch.randn(4, 6, 3, 3, generator=rng)}
    assert float(distill.layer_match({"x": a}, theirs, *names)) > 0.5
    wide = torch.cat([a, a], dim=1)  # other widths: places are as alike as they were
    assert float(distill.distance(a, wide)) == pytest.approx(0, abs=1e-6)
    assert float(distill.similarity(a, wide)) == pytest.approx(1, abs=1e-5)


def test_a_guided_student_is_told_its_scale(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="guidance_embedding_size"):
        taught(tmp_path, {"kind": "guidance"}, {})
    made = taught(tmp_path, {"kind": "guidance"}, {"guidance_embedding_size": 16})
    torch.nn.init.normal_(made.module.time_embedding.cond_proj.weight)
    batch = made.batch(0, 4)
    loss, _ = made.loss(made.module, batch)
    scale = 1 + 7 * batch.scale
    assert len(set(scale.tolist())) == 4
    abar = made.schedule.alpha_bar(batch.t)
    x = prediction.noised(batch.latents, batch.noise, abar).float()
    teacher, empty = made.lesson.teacher.unet, made.frozen.words([""]).expand(4, -1, -1)
    cond, uncond = teacher(x, batch.t, batch.told.tokens), teacher(x, batch.t, empty)
    wanted = uncond + scale[:, None, None, None] * (cond - uncond)
    told = guidance.guidance_embedding(scale, 16)
    said = made.module(x, batch.t, batch.told.tokens, guidance=told)
    assert float(loss.detach()) == pytest.approx(float((said - wanted).square().mean()), rel=1e-3)


def test_neighbours_lie_on_the_solvers_grid() -> None:
    schedule = Schedule.from_spec(ScheduleSpec())
    t, t_next = distill.neighbours(torch.arange(1000), 1000, 50)
    assert t.unique().tolist() == list(range(19, 1000, 20))
    assert t_next.unique().tolist() == [0, *range(19, 980, 20)]
    assert bool((t_next < t).all())
    assert bool((t >= torch.arange(1000)).all())
    plan = grid.timesteps(schedule, 4, sampler="lcm")
    assert {int(x) for x in plan.timesteps} <= set(t.tolist())


def test_a_consistent_student_starts_at_its_own_start() -> None:
    """At t = 0 whatever the network says; elsewhere what the ``lcm`` solver reads."""
    schedule = Schedule.from_spec(ScheduleSpec(prediction_type="v"))
    x, told = torch.randn(2, 4, 4, 4), Told(torch.zeros(2, 1, 8))

    def net(x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return 0.3 * x + 1

    made = distill.starts(net, x, torch.tensor([0, 0]), told, schedule)  # type: ignore[arg-type]
    torch.testing.assert_close(made, x)
    at = 499
    made = distill.starts(net, x, torch.tensor([at, at]), told, schedule)  # type: ignore[arg-type]
    plan = grid.timesteps(schedule, explicit_timesteps=[at], sampler="lcm")
    solver = solvers.solve("lcm", x, schedule, plan, noise=lambda *_: torch.zeros_like(x))
    ask = next(solver)
    with pytest.raises(StopIteration) as end:
        solver.send(net(ask.x, torch.tensor([at]), told.tokens))
    torch.testing.assert_close(made, end.value.value.float(), rtol=1e-4, atol=1e-5)


def test_consistency_of_a_perfect_teacher_has_a_fixed_point(tmp_path: Path) -> None:
    """A teacher that knows the clean latents, and a student that says the same: no loss."""
    made = taught(tmp_path, {"kind": "consistency"}, {"guidance_embedding_size": 16})
    batch = made.batch(0, 4)

    class Knows(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, *_: Any, **__: Any) -> Tensor:
            return prediction.to_v(batch.latents, x, made.schedule.alpha_bar(t), "x0").float()

    made.lesson.teacher.unet = Knows()
    made.lesson.student = Knows()
    loss, _ = made.loss(Knows(), batch)
    assert float(loss.detach()) == pytest.approx(0, abs=2e-3)
    made.lesson.student = made.module
    wrong, _ = made.loss(made.module, batch)
    assert float(wrong.detach()) > 10 * float(loss.detach())
    made.lesson.teacher.unet = UNet(UNetSpec(**SHALLOW, layers_per_block=2))
    again, _ = made.loss(made.module, batch)
    again.backward()
    assert np.isfinite(float(again.detach()))
    assert made.module.time_embedding.cond_proj.weight.grad is not None
