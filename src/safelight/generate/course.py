"""What a request means on a model: its steps, its solver, its branches.

:func:`plot` checks all of it before anything is computed; :func:`picture` makes what the engine
takes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from safelight.conditioning import Conditioning, Script, encode_prompts, script
from safelight.diffusion import grid, guidance, noise, solvers
from safelight.diffusion.keep import keep
from safelight.engine import Picture, Progress
from safelight.errors import InvalidRequest
from safelight.generate.able import check
from safelight.generate.scene import Scene
from safelight.model import Model
from safelight.nets.unet import UNet
from safelight.request import GenerateRequest
from safelight.runtime import Saving
from safelight.spec import ScheduleSpec
from safelight.text import weighting
from safelight.text.counting import text_windows
from safelight.text.prompt import Text


@dataclass(frozen=True)
class Course:
    """How a request's pictures are denoised.

    Args:
        sampler: the solver's short name.
        options: the solver's.
        calls: how often it asks the network.
        start: from ``noise``, or from a noised ``picture``; ``nothing``: that picture as it is.
        scene: the pictures that came with the request.
        notes: what the caller should know of all this.
    """

    sampler: str
    grid: grid.Grid
    options: Mapping[str, Any]
    calls: int
    scene: Scene
    start: Literal["noise", "picture", "nothing"] = "noise"
    notes: tuple[str, ...] = ()


def plot(model: Model, request: GenerateRequest) -> Course:
    """Lay out a resolved request.

    Raises:
        InvalidRequest: the model or the sampler cannot do what is asked.
    """
    spec = model.spec
    check(spec, request)
    if spec.text is not None and not (request.clip_skip or 0) < spec.text.layers:
        raise InvalidRequest(
            "clip_skip", f"{request.clip_skip}, but there are {spec.text.layers} text layers."
        )
    sampler = request.sampler or spec.schedule.sampler
    spacing, steps, options = published(spec.schedule, sampler)
    options |= request.sampler_options
    if request.eta is not None:
        options["eta"] = request.eta
    levels, start, notes = _levels(model, request, sampler, request.schedule or spacing, steps)
    if start == "picture" and request.strength_rule == "exact":
        # The reference's multistep samplers stumble where a run starts inside the grid.
        options |= {"pndm": {"restart": "exact"}, "lms": {"warmup": "exact"}}.get(sampler, {})
    # A solver is a generator: making one checks its options and computes nothing.
    first, source = torch.zeros(1), noise.step_noise(0, (1,))
    solvers.solve(sampler, first, model.schedule, levels, noise=source, **options).close()
    calls = 0 if start == "nothing" else solvers.calls(sampler, levels, **options)
    notes += _noise_notes(model, request)
    if (left_out := saving(request)) is not None:
        _remembers(model, left_out)
    course = Course(sampler, levels, options, calls, Scene(model, request), start, tuple(notes))
    screenplay(model, request, course)
    return course


def _levels(
    model: Model, request: GenerateRequest, sampler: str, spacing: str | None, steps: dict[str, Any]
) -> tuple[grid.Grid, Literal["noise", "picture", "nothing"], list[str]]:
    """The steps, what they start from, and notes.

    Published models default to "leading" steps, whose whole-number stride leaves the top of the
    schedule out: from pure noise that is a broken picture, above 500 steps at the latest.
    """
    schedule, family = model.schedule, grid.FAMILIES[sampler]
    count, strength, rule = request.steps or 1, request.strength, request.strength_rule
    exact = rule == "exact"
    start: Literal["noise", "picture", "nothing"] = "picture"
    if strength is None or (
        strength == 1 and (exact or request.mask is not None or model.spec.family == "inpaint")
    ):
        start = "noise"
    elif strength == 0 and exact:
        start = "nothing"
    refined = start == "picture" and exact
    total = grid.exact_run(schedule.steps, count, strength or 1, sampler)[0] if refined else count
    effective = spacing or schedule.spacing or grid.DEFAULT_SPACING[family]
    notes: list[str] = []
    if effective == "leading" and family != "lcm":
        share = grid.coverage(schedule.steps, total, sampler)
        short = share < (0.95 if refined else 0.75) or total == schedule.steps
        if short and request.schedule is None:
            spacing, steps = "trailing", {**steps, "next_step": True}
            if not refined:
                lost = f"would leave out the noisiest {1 - share:.0%} of its levels"
                why = lost if share < 1 else "reach past its levels"
                notes.append(
                    f"{total} leading steps, the model's own, {why}: trailing steps are used "
                    "instead"
                )
        elif short:
            notes.append(
                f"{total} leading steps leave out the noisiest {1 - share:.0%} of the model's "
                "levels: the picture may be broken; trailing steps would not be"
            )
    if start == "picture":
        found = grid.strength(
            schedule, count, strength or 0, spacing, exact=exact, sampler=sampler, **steps
        )
    else:
        found = grid.timesteps(schedule, count, spacing, sampler=sampler, **steps)
    return found, start, notes


def _remembers(model: Model, left_out: Saving) -> None:
    """Refuse what the model's UNet, or the way it runs here, cannot remember."""
    if type(model.unet) is not UNet:
        raise InvalidRequest("block_cache", f"{model.spec.name} has a UNet of another kind.")
    if left_out.freeze_after < 1 and not model.runtime.plan.fused:
        raise InvalidRequest(
            "freeze_context",
            "works where the network is laid out for the machine: float32 on a CPU.",
            "Leave it out; guidance_until alone saves most of it.",
        )


def _noise_notes(model: Model, request: GenerateRequest) -> list[str]:
    level, most = request.noise_level, model.spec.max_noise_level
    if model.spec.family != "unclip" or level is None:
        return []
    if level > most:
        return [f"noise level {level} is read as {most}, the model's last"]
    return ["noise level 0 still adds a little noise to the picture's embedding"] * (level == 0)


def published(
    spec: ScheduleSpec, sampler: str
) -> tuple[str | None, dict[str, Any], dict[str, Any]]:
    """What a published scheduler's further settings mean here: spacing, grid and solver options.

    They are the card's for its own sampler; another sampler starts from its own defaults.

    Raises:
        InvalidRequest: a setting that this sampler does not have.
    """
    spacing: str | None = None
    steps: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if sampler != spec.sampler:
        return spacing, steps, options
    renamed = {"solver_type": "variant", "variance_type": "variance"}
    for key, value in spec.options.items():
        if key in ("use_karras_sigmas", "use_exponential_sigmas"):
            spacing = key.split("_")[1] if value else spacing
        elif key == "final_sigmas_type":
            steps["final_sigma"] = "min" if value == "sigma_min" else "zero"
        elif key == "original_inference_steps":
            steps["lcm_steps"] = value
        elif renamed.get(key, key) in solvers.SOLVERS[sampler].accepts:
            options[renamed.get(key, key)] = value
        else:
            raise InvalidRequest(
                "sampler",
                f"the model's own {sampler} has {key} = {value}, which is not supported.",
                "Choose another sampler.",
            )
    return spacing, steps, options


def _unknown(text: str, known: tuple[str, ...]) -> list[str]:
    """Words of ``text`` that a model of so few words has never seen, each once, in order."""
    words = re.findall(r"[a-z]+", text.lower()) if known else []
    return [word for word in dict.fromkeys(words) if word not in known]


def notices(model: Model, request: GenerateRequest) -> tuple[str, ...]:
    """What the caller should know: words the model has never heard, prompts of several windows."""
    found = []
    for name, texts in _texts(request).items():
        words = " ".join(words for text in texts for words, _ in text.fragments)
        if unknown := _unknown(words, model.spec.words):
            found.append(
                f"{model.spec.name} knows {len(model.spec.words)} words, and has never heard of: "
                f"{', '.join(unknown)}"
            )
        if model.tokenizer is not None:
            read = max((text_windows(model.tokenizer, text) for text in texts), key=len)
            if len(read) > 1:
                tokens = sum(source >= 0 for window in read for source in window.sources)
                found.append(
                    f"the {name} has {tokens} tokens: read in {len(read)} windows of "
                    f"{model.tokenizer.context_length - 2}, nothing is cut"
                )
    return tuple(dict.fromkeys(found))


def _texts(request: GenerateRequest) -> dict[str, tuple[Text, ...]]:
    """What the prompts say at all steps, by the name that people know them by."""
    steps = request.steps or 1
    return {
        "prompt": weighting.parse(request.prompt, request.weighting).texts(steps),
        "negative prompt": weighting.parse(
            request.negative_prompt, request.weighting, "negative_prompt"
        ).texts(steps),
    }


def picture(
    model: Model,
    request: GenerateRequest,
    course: Course,
    on_step: Callable[[Progress], None] | None = None,
) -> Picture:
    """One picture for the engine. Its noise hangs on its seed alone."""
    spec, seed = model.spec, request.seed or 0
    factor = spec.vae.factor
    width, height = (request.width or 0) // factor, (request.height or 0) // factor
    shape = (1, spec.vae.latent_channels, height, width)
    brownian = solvers.SOLVERS[course.sampler].brownian
    source = noise.brownian_noise if brownian else noise.step_noise
    first = noise.initial_noise(seed, shape)
    begun = course.scene.place(seed, first, course.grid, pure=course.start == "noise")
    solver = solvers.solve(
        course.sampler,
        begun.x.to(model.device, model.dtype),
        model.schedule,
        begun.grid,
        noise=source(seed, shape),
        **course.options,
    )
    if begun.image is not None and begun.mask is not None and begun.noise is not None:
        solver = keep(solver, begun.image, begun.mask, begun.noise, begun.first)
    play = screenplay(model, request, course)
    return Picture(
        solver,
        course.scene.told(seed, branches(model, request, play), play.negatives),
        play.program,
        rescale=request.guidance_rescale,
        unguided=play.unguided,
        on_step=on_step,
        alone=request.deterministic,
        saving=saving(request),
    )


def saving(request: GenerateRequest) -> Saving | None:
    """What the request's network calls leave out."""
    interval = request.block_cache or 1
    frozen = request.guidance_until if request.freeze_context else None
    if interval == 1 and frozen is None:
        return None
    return Saving(
        interval,
        request.block_cache_branch or 0,
        request.block_cache_spacing or "uniform",
        1.0 if frozen is None else frozen,
    )


def screenplay(model: Model, request: GenerateRequest, course: Course) -> Script:
    """Which texts the run reads, and the guidance program over them.

    Raises:
        InvalidRequest: a mistake in a prompt, with its place.
    """
    levels, scale = course.grid, request.guidance_scale or 0.0
    low, high = request.guidance_interval or (0.0, float("inf"))
    share = 1.0 if request.guidance_until is None else request.guidance_until
    # A distilled student is told its scale.
    guided = not model.spec.unet.guidance_embedding_size
    if model.spec.text is None:
        program = guidance.program(scale, low, high, share) if guided else guidance.plain()
        return Script((), 1, program, guidance.plain())
    return script(
        weighting.parse(request.prompt, request.weighting),
        weighting.parse(request.negative_prompt, request.weighting, "negative_prompt"),
        max(1, round(levels.steps * len(levels) / len(levels.timesteps))),
        scale,
        low,
        high,
        share,
        guided=guided,
    )


def branches(model: Model, request: GenerateRequest, play: Script) -> list[Conditioning]:
    """One a text of ``play``, encoded by themselves: other prompts' lengths play no part."""
    if not play.texts:
        return []  # the model reads none
    encoded = encode_prompts(model, play.texts, clip_skip=request.clip_skip or 0)
    if width := model.spec.unet.guidance_embedding_size:
        scale = torch.tensor([request.guidance_scale or 0.0])
        told = guidance.guidance_embedding(scale, width)[0].to(model.device)
        encoded = [dataclasses.replace(each, guidance=told) for each in encoded]
    return encoded
