"""What a request means on a model: its steps, its solver, its branches.

:func:`plot` checks all of it before anything is computed; :func:`picture` makes what the engine
takes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from safelight.conditioning import Conditioning, encode_prompts
from safelight.diffusion import grid, guidance, noise, solvers
from safelight.engine import Picture, Progress
from safelight.errors import InvalidRequest
from safelight.model import Model
from safelight.request import GenerateRequest
from safelight.spec import ScheduleSpec
from safelight.text import weighting


@dataclass(frozen=True)
class Course:
    """How a request's pictures are denoised.

    Args:
        sampler: the solver's short name.
        options: the solver's.
        calls: how often it asks the network.
    """

    sampler: str
    grid: grid.Grid
    options: Mapping[str, Any]
    calls: int


def plot(model: Model, request: GenerateRequest) -> Course:
    """Lay out a resolved request.

    Raises:
        InvalidRequest: the model or the sampler cannot do what is asked.
    """
    spec = model.spec
    plain = spec.unet.in_channels == spec.vae.latent_channels
    if spec.text is None or not plain or spec.unet.class_embedding != "none":
        raise InvalidRequest("model", f"{spec.name} does not make pictures from text alone.")
    if not (request.clip_skip or 0) < spec.text.layers:
        raise InvalidRequest(
            "clip_skip", f"{request.clip_skip}, but there are {spec.text.layers} text layers."
        )
    for text in (request.prompt, request.negative_prompt):
        weighting.parse(text, request.weighting)
    sampler = request.sampler or spec.schedule.sampler
    spacing, steps, options = published(spec.schedule, sampler)
    options |= request.sampler_options
    if request.eta is not None:
        options["eta"] = request.eta
    spacing = request.schedule or spacing
    levels = grid.timesteps(model.schedule, request.steps, spacing, sampler=sampler, **steps)
    # A solver is a generator: making one checks its options and computes nothing.
    start, source = torch.zeros(1), noise.step_noise(0, (1,))
    solvers.solve(sampler, start, model.schedule, levels, noise=source, **options).close()
    return Course(sampler, levels, options, solvers.calls(sampler, levels, **options))


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
    for name, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt)):
        fragments = weighting.parse(text, request.weighting)
        words = " ".join(fragment for fragment, _ in fragments)
        if unknown := _unknown(words, model.spec.words):
            found.append(
                f"{model.spec.name} knows {len(model.spec.words)} words, and has never heard of: "
                f"{', '.join(unknown)}"
            )
        if model.tokenizer is not None:
            tokens = sum(model.tokenizer.count(fragment) for fragment, _ in fragments)
            room = model.tokenizer.context_length - 2
            if tokens > room:
                found.append(
                    f"the {name} has {tokens} tokens: read in {-(-tokens // room)} windows of "
                    f"{room}, nothing is cut"
                )
    return tuple(dict.fromkeys(found))


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
    solver = solvers.solve(
        course.sampler,
        noise.initial_noise(seed, shape).to(model.device, model.dtype),
        model.schedule,
        course.grid,
        noise=source(seed, shape),
        **course.options,
    )
    low, high = request.guidance_interval or (0.0, float("inf"))
    if spec.unet.guidance_embedding_size:  # a distilled student is told its scale
        program = guidance.plain()
    else:
        program = guidance.program(request.guidance_scale or 0.0, low, high)
    return Picture(
        solver,
        branches(model, request),
        program,
        rescale=request.guidance_rescale,
        on_step=on_step,
        alone=request.deterministic,
    )


def branches(model: Model, request: GenerateRequest) -> list[Conditioning]:
    """Unconditional and prompt, encoded by themselves: other prompts' lengths play no part."""
    scale, width = request.guidance_scale or 0.0, model.spec.unet.guidance_embedding_size
    texts = [request.negative_prompt, request.prompt]
    if scale <= 1 or width:
        texts = [request.prompt]  # a long negative prompt must not lengthen this one
    parsed = [weighting.parse(text, request.weighting) for text in texts]
    encoded = encode_prompts(model, parsed, clip_skip=request.clip_skip or 0)
    if width:
        told = guidance.guidance_embedding(torch.tensor([scale]), width)[0].to(model.device)
        encoded = [dataclasses.replace(each, guidance=told) for each in encoded]
    return [encoded[0], encoded[-1]]
