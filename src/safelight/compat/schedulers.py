"""diffusers' scheduler classes, as names of samplers.

``pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)`` chooses a sampler;
the model's own noise schedule and spacing stay, as they do in diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from safelight import names
from safelight.errors import InvalidRequest

_SPACINGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
}
_VARIANTS = {
    "sde-dpmsolver++": {2: "dpm++2m-sde", 3: "dpm++3m-sde"},
    "dpmsolver++": {2: "dpm++2m", 3: "dpm++3m"},
}
_OPTIONS = {
    "solver_type": ("variant", ("midpoint", "bh2")),
    "lower_order_final": ("lower_order_final", (True,)),
    "euler_at_final": ("euler_at_final", (False,)),
}
"""The solver's name for a setting, and the settings that are its default."""
_READ = (*_SPACINGS, *_OPTIONS, "timestep_spacing", "algorithm_type", "solver_order")


class Scheduler:
    """A sampler's name and the settings it was made with.

    Args:
        config: settings in diffusers' spelling.

    Attributes:
        sampler: the short name, or None for the model's own.
        spacing: a schedule's short name, or None for the model's own.
        options: the solver's, where they are not its defaults.
    """

    sampler: str | None = None

    def __init__(self, **config: Any) -> None:
        self.config: dict[str, Any] = config
        self.sampler = type(self).sampler
        self.spacing = next((s for key, s in _SPACINGS.items() if config.get(key)), None)
        if self.spacing is None and config.get("timestep_spacing"):
            self.spacing = names.schedule(config["timestep_spacing"])
        self.options = {
            name: config[key]
            for key, (name, plain) in _OPTIONS.items()
            if key in self.reads and config.get(key) not in (None, *plain)
        }

    reads: tuple[str, ...] = ()
    """Which of the solver's settings this class has."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> Self:
        """A scheduler of this class with another's settings, and some changed.

        Raises:
            InvalidRequest: a change of a setting that has no effect here.
        """
        for key, value in changes.items():
            if key not in _READ and (key not in config or config[key] != value):
                raise InvalidRequest(
                    key,
                    "cannot be changed here: the noise schedule is the model's own.",
                    f"These can: {', '.join(_READ)}.",
                )
        return cls(**{**config, **changes})

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> Self:
        """This sampler on the model's own settings, whatever model comes to use it."""
        return cls()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.config.items())})"


class DDIMScheduler(Scheduler):
    """Song et al. 2020."""

    sampler = "ddim"


class DDPMScheduler(Scheduler):
    """Ho et al. 2020."""

    sampler = "ddpm"


class PNDMScheduler(Scheduler):
    """Liu et al. 2022, without its Runge-Kutta start: PLMS."""

    sampler = "pndm"


class DPMSolverMultistepScheduler(Scheduler):
    """Lu et al. 2022: ``algorithm_type`` and ``solver_order`` choose among its family."""

    sampler = "dpm++2m"
    reads = ("solver_type", "lower_order_final", "euler_at_final")

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        kind, order = config.get("algorithm_type", "dpmsolver++"), config.get("solver_order", 2)
        try:
            self.sampler = _VARIANTS[kind][order]
        except KeyError:
            raise InvalidRequest(
                "algorithm_type",
                f"{kind!r} of order {order} is not supported.",
                f"Use {' or '.join(_VARIANTS)} of order 2 or 3.",
            ) from None


class EulerDiscreteScheduler(Scheduler):
    """Karras et al. 2022, algorithm 2 without churn and without its second-order correction."""

    sampler = "euler"


class EulerAncestralDiscreteScheduler(Scheduler):
    """Euler steps with fresh noise."""

    sampler = "euler-a"


class HeunDiscreteScheduler(Scheduler):
    """Karras et al. 2022, algorithm 1."""

    sampler = "heun"


class LMSDiscreteScheduler(Scheduler):
    """Linear multistep."""

    sampler = "lms"


class UniPCMultistepScheduler(Scheduler):
    """Zhao et al. 2023."""

    sampler = "unipc"
    reads = ("solver_type", "lower_order_final")


class LCMScheduler(Scheduler):
    """Luo et al. 2023."""

    sampler = "lcm"


def read(scheduler: Any) -> Scheduler:
    """One of ours, as it is; one of diffusers', by its class name and ``config``.

    Raises:
        InvalidRequest: neither.
    """
    if isinstance(scheduler, Scheduler):
        return scheduler
    own = {kind.__name__: kind for kind in Scheduler.__subclasses__()}
    kind = own.get(type(scheduler).__name__)
    if kind is None or not hasattr(scheduler, "config"):
        raise InvalidRequest(
            "scheduler", f"{type(scheduler).__name__} is not supported.", f"One of {', '.join(own)}"
        )
    return kind(**dict(scheduler.config))
