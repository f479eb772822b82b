"""Published ``scheduler_config.json`` files, to a :class:`ScheduleSpec` and back.

A scheduler's config says two things: the noise schedule that the network was trained on, which
is binding, and how its card samples from it, which is a default.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from safelight import names
from safelight.errors import WeightsError
from safelight.spec import ScheduleSpec
from safelight.store.configs import check, words

log = logging.getLogger(__name__)

_KINDS = {
    "scaled_linear": "scaled_linear",
    "linear": "linear",
    "squaredcos_cap_v2": "squared_cosine",
}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
_DPM = "DPMSolverMultistepScheduler"
# (algorithm_type, solver_order) of the multistep class.
_DPM_SAMPLERS = {
    ("dpmsolver++", 2): "dpm++2m",
    ("dpmsolver++", 3): "dpm++3m",
    ("sde-dpmsolver++", 2): "dpm++2m-sde",
    ("sde-dpmsolver++", 3): "dpm++3m-sde",
}
# Defaults of the classes where they are not those of the others.
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"set_alpha_to_one": True, "clip_sample": True},
    "DDPMScheduler": {"clip_sample": True},
    "LCMScheduler": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": True,
    },
    "HeunDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
}
_READ = words(
    "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type "
    "timestep_spacing steps_offset set_alpha_to_one rescale_betas_zero_snr skip_prk_steps "
    "clip_sample algorithm_type solver_order"
)
# Settings that change the mathematics: kept in the spec's options where they differ from these,
# the reference's defaults, for the sampler to honour or to refuse.
_OPTIONS: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "final_sigmas_type": "zero",
    "euler_at_final": False,
    "lower_order_final": True,
    "solver_type": None,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
    "variance_type": None,
}
_SOLVER_TYPES = {_DPM: "midpoint", "UniPCMultistepScheduler": "bh2"}
_FIXED: dict[str, tuple[Any, ...]] = {
    "thresholding": (False, None),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "shift_terminal": (None,),
    "lambda_min_clipped": (float("-inf"), "-inf", -float("inf")),
}
# Parameters of settings that are off.
_UNUSED = words(
    "dynamic_thresholding_ratio sample_max_value clip_sample_range flow_shift time_shift_type"
)


def schedule_spec(
    config: Mapping[str, Any], file: Path, *, pipeline_fixes: bool = False
) -> tuple[ScheduleSpec, list[str]]:
    """Translate a scheduler's config.

    Args:
        config: ``scheduler_config.json``.
        file: named in errors.
        pipeline_fixes: the Stable Diffusion pipelines of the reference set ``steps_offset`` to 1
            and ``clip_sample`` to false, whatever the file says.

    Returns:
        the spec, and notes about what was not taken as it stands.

    Raises:
        WeightsError: a setting that changes the mathematics is not supported; names the key.
    """
    class_name = str(config.get("_class_name", ""))
    check(config, file, (*_READ, *_OPTIONS, *_UNUSED), _FIXED)
    values = {**_CLASS_DEFAULTS.get(class_name, {}), **config}
    notes: list[str] = []

    sampler = _sampler(class_name, values, file, notes)
    kind = _KINDS.get(values.get("beta_schedule", "linear"))
    if kind is None:
        raise WeightsError(file, f"beta_schedule = {values['beta_schedule']!r} is not supported.")
    prediction = _PREDICTIONS.get(values.get("prediction_type", "epsilon"))
    if prediction is None:
        raise WeightsError(
            file, f"prediction_type = {values['prediction_type']!r} is not supported."
        )
    offset = values.get("steps_offset", 0)
    options = _options(class_name, values)
    if values.get("clip_sample") and not pipeline_fixes:
        options["clip_sample"] = True
    if pipeline_fixes and offset != 1:
        # The pipelines ask for 1 where the class has no such setting, too.
        if "steps_offset" in config:
            notes.append(f"steps_offset {offset} read as 1, as the reference pipelines do")
        offset = 1
    try:
        spec = ScheduleSpec(
            kind=kind,  # type: ignore[arg-type]
            beta_start=values.get("beta_start", 0.0001),
            beta_end=values.get("beta_end", 0.02),
            steps=values.get("num_train_timesteps", 1000),
            trained_betas=values.get("trained_betas"),
            prediction_type=prediction,  # type: ignore[arg-type]
            zero_terminal_snr=values.get("rescale_betas_zero_snr", False),
            sampler=sampler,
            spacing=values.get("timestep_spacing"),
            steps_offset=offset,
            final_alpha_one=values.get("set_alpha_to_one", False),
            options=options,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise WeightsError(file, f"{first['loc'][0]}: {first['msg']}.") from error
    return spec, notes


def scheduler_config(spec: ScheduleSpec) -> dict[str, Any]:
    """The config of the spec's sampler, as ``diffusers`` reads it."""
    class_name = names.diffusers_class(spec.sampler)
    config: dict[str, Any] = {
        "_class_name": class_name,
        "beta_end": spec.beta_end,
        "beta_schedule": {v: k for k, v in _KINDS.items()}[spec.kind],
        "beta_start": spec.beta_start,
        "num_train_timesteps": spec.steps,
        "prediction_type": {v: k for k, v in _PREDICTIONS.items()}[spec.prediction_type],
        "steps_offset": spec.steps_offset,
        "trained_betas": None if spec.trained_betas is None else list(spec.trained_betas),
    }
    if spec.spacing is not None:
        config["timestep_spacing"] = spec.spacing
    if class_name in ("DDIMScheduler", "PNDMScheduler", "LCMScheduler"):
        config["set_alpha_to_one"] = spec.final_alpha_one
    if class_name == "PNDMScheduler":
        config["skip_prk_steps"] = True
    else:
        config["rescale_betas_zero_snr"] = spec.zero_terminal_snr
    if class_name not in (_DPM, "PNDMScheduler", "UniPCMultistepScheduler"):
        config["clip_sample"] = False
    if class_name == _DPM:
        kind, order = {v: k for k, v in _DPM_SAMPLERS.items()}[names.sampler(spec.sampler).sampler]
        config |= {"algorithm_type": kind, "solver_order": order}
    return {**config, **spec.options}


def _sampler(class_name: str, values: Mapping[str, Any], file: Path, notes: list[str]) -> str:
    if class_name == _DPM:
        key = (values.get("algorithm_type", "dpmsolver++"), values.get("solver_order", 2))
        if key in _DPM_SAMPLERS:
            return _DPM_SAMPLERS[key]
        notes.append(f"{class_name} with {key[0]} of order {key[1]} is unknown; using dpm++2m")
        return "dpm++2m"
    if class_name == "PNDMScheduler" and not values.get("skip_prk_steps", False):
        raise WeightsError(
            file, "skip_prk_steps = false (Runge-Kutta warm-up) is not supported for PNDM."
        )
    for sampler in names.SAMPLERS:
        if sampler.diffusers == class_name:
            return sampler.name
    notes.append(f"the sampler {class_name or '(unnamed)'} is unknown; using dpm++2m instead")
    return "dpm++2m"


def _options(class_name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the reference's defaults."""
    neutral = {**_OPTIONS, "solver_type": _SOLVER_TYPES.get(class_name)}
    if class_name == "DDPMScheduler":
        neutral["variance_type"] = "fixed_small"
    return {
        key: values[key]
        for key, default in neutral.items()
        if key in values and values[key] is not None and values[key] != default
    }
