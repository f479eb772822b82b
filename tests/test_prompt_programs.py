"""Prompts that change during a run or join others: what the network is asked, and seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from micro_models import MICRO, micro_model, toy_model
from safelight.conditioning import encode_prompts, script
from safelight.diffusion.guidance import Step
from safelight.diffusion.solvers import Ask
from safelight.engine import Engine, Picture
from safelight.errors import InvalidRequest
from safelight.generate import Generator, course
from safelight.request import GenerateRequest, ImageResult
from safelight.text.weighting import parse

EDITED = "a [red:blue:0.5] cube"
ALTERNATING = "a [cone|ball|cube]"
JOINED = "a red cube AND a blue [ball|cone] :0.6 AND a sphere :-0.3"


def read(prompt: str, negative: str = "", steps: int = 4, scale: float = 3.0, **options):
    return script(
        parse(prompt, "a1111"), parse(negative, "a1111", "negative_prompt"), steps, scale, **options
    )


def said(play, step: int, calls: int = 4) -> dict[str, float]:
    """Text -> weight of a network call."""
    chosen = play.program(Step(step, calls, 500.0, 1.0))
    words = ["".join(t for t, _ in text.fragments).strip() for text in play.texts]
    return {words[branch]: pytest.approx(weight) for branch, weight in chosen}


def test_editing_names_other_branches_at_other_steps():
    play = read(EDITED)
    assert [said(play, k) for k in range(4)] == [
        *[{"": -2, "a red cube": 3}] * 2,
        *[{"": -2, "a blue cube": 3}] * 2,
    ]
    assert len(play.texts) == 3, "each text is encoded once"


def test_alternation_in_both_prompts():
    play = read("a [cone|ball]", "[dark|]")
    assert [said(play, k) for k in range(2)] == [{"dark": -2, "a cone": 3}, {"": -2, "a ball": 3}]
    assert play.negatives == 2


def test_and_is_one_branch_more_a_part():
    play = read("a cat AND a dog :0.5 AND a cow:-0.25", scale=4.0)
    assert said(play, 0) == {"": 1 - 4 * 1.25, "a cat": 4, "a dog": 2, "a cow": -1}
    unguided = read("a cat AND a dog", scale=1.0)
    assert said(unguided, 0) == {"": -1, "a cat": 1, "a dog": 1}


def test_samplers_that_ask_twice_a_step_read_one_text_at_it():
    play = read("[cone|ball]", steps=3, scale=1.0)
    heun = [next(iter(said(play, k, calls=5))) for k in range(5)]
    assert heun == ["cone", "cone", "ball", "ball", "cone"]
    pndm = [next(iter(said(play, k, calls=4))) for k in range(4)]
    assert pndm == ["cone", "cone", "ball", "cone"]


def test_interval_leaves_the_parts_without_guidance_outside():
    play = read("a cat AND a dog :0.5", scale=4.0, low=0.5, high=2.0)
    outside = dict(play.program(Step(0, 4, 900.0, 9.0)))
    assert outside == pytest.approx({0: -0.5, 1: 1.0, 2: 0.5})


def test_a_student_has_no_and():
    with pytest.raises(InvalidRequest, match="AND"):
        read("a AND b", guided=False)
    assert said(read(EDITED, guided=False), 3) == {"a blue cube": 1}


def difference(a: ImageResult, b: ImageResult) -> int:
    one, two = (np.asarray(r.image, dtype=int) for r in (a, b))
    return int(np.abs(one - two).max())


@pytest.mark.parametrize("sampler", ["dpm++2m", "euler-a", "heun", "pndm"])
def test_seeds_in_mixed_batches(sampler):
    generator = Generator(toy_model())
    shared = {"weighting": "a1111", "steps": 4, "sampler": sampler, "guidance_scale": 3.0}
    requests = [
        GenerateRequest(prompt=prompt, negative_prompt=negative, seed=10 * k, count=2, **shared)
        for k, (prompt, negative) in enumerate(
            [(EDITED, ""), (ALTERNATING, "[dark|bright]"), (JOINED, ""), ("a cube", "a ball")]
        )
    ]
    together = generator.generate(request=requests)
    assert len(together) == 8
    for result in together:
        (alone,) = generator.generate(request=result.request)
        assert difference(result, alone) <= 1
    fresh = Generator(toy_model())
    for k, request in enumerate(requests):
        (second,) = fresh.generate(request=request.replace(seed=request.seed + 1, count=1))
        assert difference(together[2 * k + 1], second) <= 1
    assert difference(together[0], together[6]) > 1


def test_programs_change_pictures_as_they_should():
    generator = Generator(toy_model())

    def picture(prompt: str) -> ImageResult:
        (result,) = generator.generate(
            prompt, weighting="a1111", steps=4, seed=3, guidance_scale=3.0, sampler="euler"
        )
        return result

    assert difference(picture("a red [cube:cube:0.5]"), picture("a red cube")) <= 1
    assert difference(picture("a cube :0.5 AND a cube :0.5"), picture("a cube")) <= 1
    assert difference(picture("[red cube:ball:1.0]"), picture("red cube")) <= 1
    assert difference(picture("[red cube:ball:0.5]"), picture("red cube")) > 0


def test_an_edited_run_against_one_written_out():
    """Euler by hand: the first half reads one prompt, the second half the other."""
    model = toy_model()
    request = GenerateRequest(
        prompt="[red:blue:2]", weighting="a1111", steps=4, seed=5, guidance_scale=3.0,
        sampler="euler",
    ).resolved(MICRO)  # fmt: skip
    play = course.screenplay(model, request, course.plot(model, request))
    uncond, red, blue = (c.tokens for c in course.branches(model, request, play))
    plain = encode_prompts(model, ["", "red", "blue"])
    for ours, expected in zip((uncond, red, blue), plain, strict=True):
        assert torch.equal(ours, expected.tokens)
    chosen = [play.program(Step(k, 4, 1.0, 1.0)) for k in range(4)]
    assert [c[1][0] for c in chosen] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"prompt": "a [b|c:3]"}, "prompt: at character 3"),
        ({"prompt": "a", "negative_prompt": "x [b|c:3]"}, "negative_prompt: at character 3"),
        ({"prompt": "a <lora:x:1>"}, "loras: no LoRA 'x'"),
    ],
)
def test_mistakes_come_before_any_work(fields, place):
    model = micro_model()
    with pytest.raises(InvalidRequest, match=place):
        Generator(model).stream(**fields, weighting="a1111")


def test_clip_skip_in_both_counts():
    one = GenerateRequest.from_kwargs(prompt="a", clip_skip=1)
    two = GenerateRequest.from_kwargs(prompt="a", CLIP_stop_at_last_layers=2)
    assert one == two
    with pytest.raises(InvalidRequest, match="CLIP_stop_at_last_layers: must be at least 1"):
        GenerateRequest.from_kwargs(prompt="a", CLIP_stop_at_last_layers=0)
    with pytest.raises(InvalidRequest, match="means the same as clip_skip"):
        GenerateRequest.from_kwargs(prompt="a", clip_skip=1, CLIP_stop_at_last_layers=2)


@pytest.mark.parametrize(
    ("prompt", "scale"),
    [
        ("a red cube", 3.0),
        ("a red cube AND a blue ball :0.6 AND a sphere :-0.3", 3.0),
        ("a cube AND a ball :-0.5", 2.0),  # guidance takes no unconditional, its rescale does
        ("a cube AND a ball", 1.0),
    ],
)
def test_rescale_goes_towards_all_parts_without_guidance(prompt, scale):
    """Lin et al. 2024, Eq. 15 and 16, with the conditional prediction u + Σ w (c - u)."""
    model = toy_model()
    request = GenerateRequest(
        prompt=prompt, negative_prompt="dark", weighting="a1111", steps=1, seed=5,
        guidance_scale=scale, guidance_rescale=0.7,
    ).resolved(MICRO)  # fmt: skip
    play = course.screenplay(model, request, course.plot(model, request))
    told = course.branches(model, request, play)
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))

    def once():
        return (yield Ask(x, 500.0, 0, 1, 1.0, "epsilon"))

    made = Picture(once(), told, play.program, rescale=0.7, unguided=play.unguided)
    Engine(model).run([made])
    read = {"".join(t for t, _ in text.fragments).strip(): k for k, text in enumerate(play.texts)}
    u, *said = (
        model.unet(x, torch.tensor([500.0]), told[read[words]].tokens[None])
        for words in ["dark", *(part.split(" :")[0] for part in prompt.split(" AND "))]
    )
    weights = [float(f"{part} :1".split(" :")[1]) for part in prompt.split(" AND ")]
    away = sum(w * (c - u) for w, c in zip(weights, said, strict=True))
    guided, plain = u + scale * away, u + away
    wanted = guided * (0.7 * plain.std() / guided.std() + 0.3)
    assert torch.allclose(made.result(), wanted, atol=1e-5)
    last = guided * (0.7 * said[-1].std() / guided.std() + 0.3)
    if " AND " in prompt and scale > 1:
        assert not torch.allclose(made.result(), last, atol=1e-4)
