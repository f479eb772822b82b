"""The prior: a picture embedding for a prompt, which unCLIP then decodes.

Ramesh et al. 2022, section 2.2, as Karlo published it: x0 predictions, clamped, DDPM steps on a
squared-cosine schedule, guided by the empty prompt. An embedding is a few hundred numbers, so this
run has no place in the engine's batches; the solver is the same generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.diffusion import grid, noise, solvers
from safelight.diffusion.prediction import working
from safelight.diffusion.schedule import Schedule
from safelight.nets.clip import TextTower
from safelight.nets.prior import Prior
from safelight.spec import PriorSpec

if TYPE_CHECKING:
    from safelight.text.tokenizer import Tokenizer


@dataclass(eq=False)
class PriorModel:
    """A prior with its own text tower and tokenizer."""

    spec: PriorSpec
    net: Prior
    text: TextTower
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        self.schedule = Schedule.from_spec(self.spec.schedule)

    def to(self, device: torch.device, dtype: torch.dtype) -> PriorModel:
        """Move both networks, for good."""
        for net in (self.net, self.text):
            net.requires_grad_(False).eval().to(device, dtype)
        return self

    @torch.inference_mode()
    def sample(
        self,
        prompt: str,
        seed: int,
        *,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance_scale: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Tensor:
        """A picture embedding in CLIP's own scale, ``(embedding_width,)``, float32.

        Args:
            seed: of the picture that it is for.
            guidance_scale: 1 or less: none.
            cancelled: asked before each step.
        """
        spec = self.spec
        scale = spec.guidance_scale if guidance_scale is None else guidance_scale
        texts = [negative_prompt, prompt] if scale > 1 else [prompt]
        embedding, states, mask = self._read(texts)
        shape = (1, spec.embedding_width)
        weight = self.net.proj_in.weight
        x = noise.stream(seed, shape, "prior").to(weight)
        plan = grid.timesteps(self.schedule, steps or spec.steps, sampler="ddpm")
        solver = solvers.solve(
            "ddpm",
            x,
            self.schedule,
            plan,
            noise=noise.step_noise(seed, shape, name="prior-step"),
            variance="fixed_small_log",
            clip=spec.clip,
        )
        try:
            ask = next(solver)
            while not cancelled():
                rows = ask.x.expand(len(texts), -1)
                t = torch.tensor([ask.timestep], device=rows.device)
                answer = working(self.net(rows, t, embedding, states, mask))
                if len(texts) > 1:
                    answer = answer[:1] + scale * (answer[1:] - answer[:1])
                ask = solver.send(answer)
        except StopIteration as end:
            x = end.value
        finally:
            solver.close()
        return (working(x) * self.net.clip_std + self.net.clip_mean)[0].float()

    def _read(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Projected embeddings, states, and which tokens are not padding. One window a text."""
        place = self.net.proj_in.weight.device
        ids = torch.tensor([self.tokenizer.chunks(text)[0] for text in texts], device=place)
        said = self.text(ids)
        assert said.embedding is not None
        end = (ids == self.text.spec.eos_id).int().argmax(dim=1, keepdim=True)
        mask = torch.arange(ids.shape[1], device=place)[None] <= end
        return said.embedding, said.states, mask
