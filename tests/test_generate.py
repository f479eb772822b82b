"""From a request to pictures: seeds, batches, cancelling, previews, and what goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from micro_models import MICRO, ToyUNet, ToyVAE, micro_model, toy_model
from safelight import provenance
from safelight.diffusion.solvers import SOLVERS
from safelight.errors import InvalidRequest
from safelight.generate import Cancel, Generator, Preview, Progress
from safelight.request import GenerateRequest, ImageResult, Outcome

CUBE = "a red cube on top of a blue sphere"


@pytest.fixture
def toy() -> Generator:
    return Generator(toy_model())


SHARED = Generator(toy_model())


def pixels(result: ImageResult) -> np.ndarray:
    assert result.image is not None, result.message
    return np.asarray(result.image, dtype=int)


def difference(a: ImageResult, b: ImageResult) -> int:
    return int(np.abs(pixels(a) - pixels(b)).max())


# -- seeds --------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    sampler=st.sampled_from(sorted(SOLVERS)),
    seed=st.integers(0, 2**32),
    count=st.integers(2, 5),
    steps=st.integers(1, 4),
    scale=st.sampled_from([1.0, 3.0]),
    deterministic=st.booleans(),
    data=st.data(),
)
def test_picture_k_of_seed_s_is_picture_0_of_seed_s_plus_k(
    sampler: str,
    seed: int,
    count: int,
    steps: int,
    scale: float,
    deterministic: bool,
    data: Any,
) -> None:
    settings = {
        "sampler": sampler,
        "steps": steps,
        "guidance_scale": scale,
        "deterministic": deterministic,
    }
    together = SHARED.generate(CUBE, seed=seed, count=count, **settings)
    assert [r.seed for r in together] == [seed + k for k in range(count)]
    k = data.draw(st.integers(0, count - 1))
    (alone,) = SHARED.generate(CUBE, seed=seed + k, **settings)
    assert difference(alone, together[k]) <= (0 if deterministic else 1)
    strangers = ["a green cone", CUBE, "two words that make this prompt the longer one " * 4]
    mixed = SHARED.generate(strangers, seed=[1, seed + k, 2], **settings)
    assert difference(alone, mixed[1]) <= (0 if deterministic else 1)
    assert difference(together[0], together[1]) > 0


@pytest.mark.parametrize("sampler", SOLVERS)
def test_the_real_networks_agree_across_batches(sampler: str) -> None:
    generator = Generator(micro_model())
    together = generator.generate(CUBE, seed=5, count=3, steps=2, sampler=sampler)
    (alone,) = generator.generate(CUBE, seed=7, steps=2, sampler=sampler)
    assert difference(alone, together[2]) <= 1


def test_deterministic_pictures_have_network_calls_of_their_own(toy: Generator) -> None:
    unet = toy.model.unet
    assert isinstance(unet, ToyUNet)
    toy.generate(CUBE, seed=1, count=3, steps=2, sampler="euler", deterministic=True)
    assert unet.calls == [2] * 6
    unet.calls.clear()
    toy.generate(CUBE, seed=1, count=3, steps=2, sampler="euler")
    assert unet.calls == [6] * 2


def test_many_threads_share_one_model(toy: Generator) -> None:
    wanted = [toy.generate(CUBE, seed=s, steps=3, deterministic=True)[0] for s in range(6)]
    got: dict[int, ImageResult] = {}

    def work(seed: int) -> None:
        got[seed] = toy.generate(CUBE, seed=seed, steps=3)[0]

    threads = [threading.Thread(target=work, args=(s,)) for s in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(difference(got[s], wanted[s]) <= 1 for s in range(6))


def test_the_global_generator_plays_no_part(toy: Generator) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = toy.generate(CUBE, seed=3, steps=2, sampler="euler-a")[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert difference(a, toy.generate(CUBE, seed=3, steps=2, sampler="euler-a")[0]) == 0


def test_seeds_of_several_prompts(toy: Generator) -> None:
    one = toy.requests(["a cone", "a cube"], seed=5, count=2)
    assert [r.seed for r in one] == [5, 7]
    each = toy.requests(["a cone", "a cube"], seed=[9, 3])
    assert [r.seed for r in each] == [9, 3]
    drawn = toy.requests(["a cone", "a cube"])
    assert drawn[0].seed is not None
    assert drawn[1].seed == drawn[0].seed + 1
    results = toy.generate(["a cone", "a cube"], seed=5, count=2, steps=1)
    assert [(r.index, r.seed, r.request.prompt) for r in results] == [
        (0, 5, "a cone"),
        (1, 6, "a cone"),
        (2, 7, "a cube"),
        (3, 8, "a cube"),
    ]


def test_micro_batches_do_not_show(toy: Generator) -> None:
    small = Generator(toy.model, micro_batch=2)
    for a, b in zip(
        toy.generate(CUBE, seed=1, count=5, steps=2),
        small.generate(CUBE, seed=1, count=5, steps=2),
        strict=True,
    ):
        assert difference(a, b) <= 1


# -- what a request means ------------------------------------------------------------------------


def test_the_cards_defaults_are_used_and_said(toy: Generator) -> None:
    (result,) = toy.generate(CUBE, seed=1)
    request = result.request
    assert (request.steps, request.sampler, request.guidance_scale) == (5, "pndm", 7.5)
    assert result.image is not None
    assert result.image.size == (32, 32)
    assert toy.generate(CUBE, seed=1, steps=1, width=48, height=16)[0].image.size == (48, 16)  # type: ignore[union-attr]


def test_without_guidance_the_negative_prompt_plays_no_part(toy: Generator) -> None:
    plain = toy.generate(CUBE, seed=1, steps=2, guidance_scale=1)[0]
    other = toy.generate(CUBE, negative_prompt="a cone " * 30, seed=1, steps=2, guidance_scale=1)[0]
    assert difference(plain, other) == 0
    guided = [
        toy.generate(CUBE, negative_prompt=n, seed=1, steps=2, guidance_scale=4)[0]
        for n in ("", "a green cone")
    ]
    assert difference(*guided) > 0


def test_an_interval_without_levels_is_no_guidance(toy: Generator) -> None:
    off = toy.generate(CUBE, seed=1, steps=3, guidance_scale=5, guidance_interval=(900, 999))[0]
    plain = toy.generate(CUBE, seed=1, steps=3, guidance_scale=1)[0]
    assert difference(off, plain) == 0


def test_published_scheduler_settings_are_honoured() -> None:
    def model(**options: Any) -> Generator:
        schedule = MICRO.schedule.replace(sampler="dpm++2m", options=options)
        return Generator(toy_model(MICRO.replace(schedule=schedule)))

    plain, karras = model(), model(use_karras_sigmas=True, solver_type="heun")
    asked = plain.generate(
        CUBE, seed=1, schedule="karras", sampler_options={"variant": "heun"}, steps=4
    )[0]
    assert difference(karras.generate(CUBE, seed=1, steps=4)[0], asked) == 0
    assert difference(plain.generate(CUBE, seed=1, steps=4)[0], asked) > 0
    euler = [g.generate(CUBE, seed=1, steps=4, sampler="euler")[0] for g in (plain, karras)]
    assert difference(*euler) == 0  # they are the card's for its own sampler
    with pytest.raises(InvalidRequest, match="use_beta_sigmas"):
        model(use_beta_sigmas=True).generate(CUBE, seed=1)


def test_notices(toy: Generator) -> None:
    (result,) = toy.generate("a red dragon on top of a wizard", seed=1, steps=1)
    assert "dragon, wizard" in result.notices[0]
    assert toy.generate(CUBE, seed=1, steps=1)[0].notices == ()
    long = "a red cube " * 10
    (notice,) = toy.generate(long, seed=1, steps=1)[0].notices
    assert "windows of 14, nothing is cut" in notice
    open_world = Generator(toy_model(MICRO.replace(words=())))
    assert open_world.generate("a red dragon", seed=1, steps=1)[0].notices == ()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"steps": 0}, "steps"),
        ({"num_inference_steps": "x"}, "num_inference_steps"),
        ({"seed": "x"}, "seed"),
        ({"seed": [1, 2]}, "seed"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a cone", 3]}, "prompt"),
        ({"prompt": ["a cone", ""], "seed": [1, 2]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"clip_skip": 2}, "clip_skip"),
        ({"sampler": "ddim", "sampler_options": {"order": 2}}, "sampler"),
        ({"sampler": "lcm", "schedule": "karras"}, "schedule"),
        ({"prompt": f"(a:{'9' * 400})", "weighting": "a1111"}, "prompt"),
        ({"batch": 3}, "batch"),
        ({"request": GenerateRequest(prompt="a cone")}, "request"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_computed(
    toy: Generator, arguments: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        toy.stream(**{"prompt": "a cone", **arguments})
    assert caught.value.field == field
    assert toy.engine.calls == 0


def test_a_model_that_needs_more_than_text_says_so() -> None:
    inpaint = MICRO.replace(unet=MICRO.unet.replace(in_channels=9), family="inpaint")
    with pytest.raises(InvalidRequest, match="text alone"):
        Generator(toy_model(inpaint)).generate(CUBE)


# -- progress and previews ------------------------------------------------------------------------


def test_the_stream_tells_every_step_then_results(toy: Generator) -> None:
    events = list(toy.stream(CUBE, seed=1, count=2, steps=4, sampler="euler", preview_every=2))
    progress = [e for e in events if isinstance(e, Progress)]
    assert [e.step for e in progress if e.picture == 1] == [1, 2, 3, 4]
    assert progress[-1].done == 1
    assert progress[-1].eta == 0
    assert [e.done for e in progress] == sorted(e.done for e in progress)
    previews = [e for e in events if isinstance(e, Preview)]
    assert sorted((e.picture, e.step) for e in previews) == [(0, 2), (1, 2)]  # not of the last
    assert all(e.image.size == (32, 32) for e in previews)
    assert sorted(e.index for e in events if isinstance(e, ImageResult)) == [0, 1]
    plain = toy.generate(CUBE, seed=1, count=2, steps=4, sampler="euler")
    results = [e for e in events if isinstance(e, ImageResult)]
    assert [difference(a, plain[a.index]) for a in results] == [0, 0]


# -- cancelling -----------------------------------------------------------------------------------


def test_the_token_stops_within_a_step_and_keeps_what_is_finished(
    toy: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one, cancel = Generator(toy.model, micro_batch=1), Cancel()
    # The toy is so fast that it would end before the token is looked at: a network call waits
    # until the step before it has been told.
    told, call = threading.Semaphore(1), one_by_one.engine._call

    def slow(rows: Any) -> Any:
        while not told.acquire(timeout=0.01):
            if any(row.picture._cancelled for row in rows):
                break  # nobody is told of this one
        return call(rows)

    monkeypatch.setattr(one_by_one.engine, "_call", slow)
    results: list[ImageResult] = []
    for event in one_by_one.stream(CUBE, seed=1, count=4, steps=5, cancel=cancel):
        if isinstance(event, Progress):
            if (event.picture, event.step) == (1, 2):
                cancel.set()
            told.release()
        if isinstance(event, ImageResult):
            results.append(event)
    assert [r.outcome for r in results] == ["ok", "cancelled", "cancelled", "cancelled"]
    assert [r.index for r in results] == [0, 1, 2, 3]
    assert all(r.image is None for r in results[1:])
    # Six of the first (PNDM asks once more), two of the second, and one that was on its way.
    assert one_by_one.engine.calls <= 9


def test_a_set_token_computes_nothing(toy: Generator) -> None:
    cancel = Cancel()
    cancel.set()
    results = toy.generate(CUBE, seed=1, count=3, cancel=cancel)
    assert [r.outcome for r in results] == ["cancelled"] * 3
    assert toy.engine.calls == 0


def test_ctrl_c_returns_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(toy_model(), micro_batch=1)
    turn = generator._turn

    def interrupted(engine: Any, group: Any, *rest: Any) -> Any:
        if group.jobs[0].index == 1:
            raise KeyboardInterrupt
        yield from turn(engine, group, *rest)

    monkeypatch.setattr(generator, "_turn", interrupted)
    with pytest.raises(KeyboardInterrupt):  # at every look: the second one means it
        generator.generate(CUBE, seed=1, count=3, steps=2)

    times = iter([True])

    def once(engine: Any, group: Any, *rest: Any) -> Any:
        if group.jobs[0].index == 1 and next(times, False):
            raise KeyboardInterrupt
        yield from turn(engine, group, *rest)

    monkeypatch.setattr(generator, "_turn", once)
    results = generator.generate(CUBE, seed=1, count=3, steps=50)
    assert [r.outcome for r in results] == ["ok", "cancelled", "cancelled"]


def test_ctrl_c_inside_a_network_call(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(toy_model(), micro_batch=1)
    call = generator.engine._call

    def interrupted(rows: Any) -> Any:
        if generator.engine.calls == 4:
            generator.engine.calls += 1
            raise KeyboardInterrupt
        return call(rows)

    monkeypatch.setattr(generator.engine, "_call", interrupted)
    results = generator.generate(CUBE, seed=1, count=3, steps=3, sampler="euler")
    assert [r.outcome for r in results] == ["ok", "cancelled", "cancelled"]
    again = generator.generate(CUBE, seed=1, steps=3, sampler="euler")
    assert again[0].outcome == "ok"
    assert again[0].image == results[0].image


def test_closing_the_stream_cancels(toy: Generator) -> None:
    events = toy.stream(CUBE, seed=1, steps=1000, sampler="euler")
    next(events)
    events.close()  # type: ignore[attr-defined]
    calls = toy.engine.calls
    assert calls < 1000
    (after,) = toy.generate(CUBE, seed=1, steps=1)
    assert after.outcome == Outcome.ok


# -- numbers that are none ------------------------------------------------------------------------


def poisoned(bad: Sequence[int]) -> Any:
    """Poisons those rows of the first network call."""
    first = iter([True])

    def poison(answer: Tensor) -> Tensor:
        if not next(first, False):
            return answer
        answer = answer.clone()
        for row in bad:
            if row < len(answer):
                answer[row] = float("nan")
        return answer

    return poison


def test_nan_of_one_picture_leaves_the_others(toy: Generator) -> None:
    unet = toy.model.unet
    assert isinstance(unet, ToyUNet)
    clean = toy.generate(CUBE, seed=1, count=3, steps=2)
    unet.poison = poisoned([2, 3])  # both branches of picture 1
    results = toy.generate(CUBE, seed=1, count=3, steps=2)
    assert [r.outcome for r in results] == ["ok", "nan", "ok"]
    assert results[1].image is None
    assert "step 1" in results[1].message
    assert "float32" in results[1].message
    assert difference(results[2], clean[2]) <= 1


def test_nan_of_the_decoder() -> None:
    generator = Generator(toy_model())
    vae = generator.model.vae
    assert isinstance(vae, ToyVAE)
    vae.poison = lambda p: p * float("nan")
    (result,) = generator.generate(CUBE, seed=1, steps=1)
    assert (result.outcome, result.image) == ("nan", None)
    assert "decoder" in result.message


def test_a_decoder_that_overflows_is_run_again_in_float32() -> None:
    generator = Generator(toy_model(dtype=torch.bfloat16))
    vae = generator.model.vae
    assert isinstance(vae, ToyVAE)
    vae.poison = lambda p: p if p.dtype == torch.float32 else p * float("inf")
    (result,) = generator.generate(CUBE, seed=1, steps=1)
    assert result.outcome == "nan_recovered"
    assert result.image is not None
    assert "again in float32" in result.message
    assert next(vae.parameters()).dtype == torch.bfloat16  # the shared weights are as they were


def test_bfloat16_pictures_are_close() -> None:
    wanted = Generator(micro_model()).generate(CUBE, seed=1, steps=3)[0]
    from copy import deepcopy

    model = micro_model()
    half = micro_model(
        dtype=torch.bfloat16,
        **{name: deepcopy(getattr(model, name)) for name in ("unet", "vae", "text")},
    )
    got = Generator(half).generate(CUBE, seed=1, steps=3)[0]
    mean = np.abs(pixels(wanted) - pixels(got)).mean()
    assert 0 < mean < 16
    assert got.metadata["plan"]["dtype"] == "bfloat16"


def test_an_error_of_one_picture_is_an_outcome(toy: Generator) -> None:
    unet = toy.model.unet
    assert isinstance(unet, ToyUNet)

    def fail() -> None:
        raise RuntimeError("out of patience")

    unet.before = fail
    (result,) = toy.generate(CUBE, seed=1)
    assert result.outcome == "error"
    assert "out of patience" in result.message


# -- metadata -------------------------------------------------------------------------------------


def test_metadata_makes_the_picture_again(toy: Generator) -> None:
    results = toy.generate(CUBE, seed=4, count=3, steps=2)
    for k, result in enumerate(results):
        assert result.metadata["batch"] == {"index": k, "size": 3, "alike": True}
        assert result.metadata["pixels"] == provenance.pixel_digest(result.image)  # type: ignore[arg-type]
        request = GenerateRequest.from_json(result.metadata["request"])
        assert request == result.request
        assert difference(toy.generate(request=request)[0], result) <= 1
    mixed = toy.generate(["a cone", "a cube"], seed=4, steps=1)[0]
    assert mixed.metadata["batch"]["alike"] is False
    assert mixed.metadata["plan"]["batch"] == "mixed"
    assert "cone" not in str(mixed.metadata["plan"])
