"""The river: request -> conditioning -> ticks of the engine -> latents -> pixels -> results.

Picture k of seed s is picture 0 of seed s + k. Pictures share network calls in micro-batches, whose
size hangs on the pictures' size alone.
"""

from __future__ import annotations

import copy
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from safelight import provenance
from safelight.diffusion.guidance import plain
from safelight.diffusion.solvers import Solver
from safelight.engine import Engine, NonFinite, Picture
from safelight.engine import Progress as Answered
from safelight.errors import Cancelled, InvalidRequest
from safelight.generate.course import Course, notices, picture, plot
from safelight.generate.events import Cancel, Clock, Event, Preview
from safelight.model import Model
from safelight.nets.vae import to_uint8
from safelight.request import MAX_SEED, GenerateRequest, ImageResult, Outcome

log = logging.getLogger(__name__)

_POLL = 0.02  # seconds between looks at the cancel token while nothing happens
_NAN_FIX = "Try dtype float32, or a lower guidance scale."

Answers = queue.SimpleQueue[tuple["_Job", Answered]]


@dataclass(eq=False)
class _Job:
    """One picture of a call."""

    index: int
    call: int
    """Which of the call's requests it belongs to; those of one have consecutive seeds."""
    request: GenerateRequest
    course: Course
    notices: tuple[str, ...]
    picture: Picture | None = None


@dataclass(eq=False)
class _Group:
    """A micro-batch; ``mixed`` when another call's pictures may have shared its network calls."""

    jobs: list[_Job]
    mixed: bool = False


def load(
    name: str | Path = "tiny",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> Generator:
    """Load a model by shipped name, folder, file or hub id.

    Args:
        options: those of :meth:`safelight.model.Model.load`.
    """
    return Generator(Model.load(name, device=device, dtype=dtype, **options))


class Generator:
    """A loaded model that makes pictures. Safe to call from many threads.

    Args:
        micro_batch: most pictures that share a network call; None chooses by their size.
    """

    def __init__(self, model: Model, *, micro_batch: int | None = None) -> None:
        self.model = model
        self.engine = Engine(model)
        self._micro_batch = micro_batch
        self._lock = threading.Lock()
        self._groups: list[_Group] = []

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        request: GenerateRequest | Sequence[GenerateRequest] | None = None,
        seed: int | Sequence[int] | None = None,
        cancel: Cancel | None = None,
        **arguments: Any,
    ) -> list[ImageResult]:
        """Make pictures, in order.

        Cancelled by the token or Ctrl-C, it returns all the same: finished pictures as they are,
        the others with the outcome ``cancelled``.

        Args:
            prompt: one, or several that share network calls.
            request: instead of everything else.
            seed: of the first picture; with several prompts they are numbered through. Or one a
                prompt.
            arguments: fields of :class:`~safelight.request.GenerateRequest`, in any program's
                spelling.

        Raises:
            InvalidRequest: a wrong argument, before anything is computed.
        """
        events = self.stream(prompt, request=request, seed=seed, cancel=cancel, **arguments)
        results = [event for event in events if isinstance(event, ImageResult)]
        return sorted(results, key=lambda result: result.index)

    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        request: GenerateRequest | Sequence[GenerateRequest] | None = None,
        seed: int | Sequence[int] | None = None,
        cancel: Cancel | None = None,
        **arguments: Any,
    ) -> Iterator[Event]:
        """The same as it happens: :class:`Progress`, :class:`Preview` (``preview_every``), and each
        :class:`~safelight.request.ImageResult` when it is finished.

        Arguments are checked at once; work begins with the first ``next``. Closing the iterator
        cancels.
        """
        requests = self.requests(prompt, request=request, seed=seed, **arguments)
        jobs: list[_Job] = []
        for call, each in enumerate(requests):
            course = plot(self.model, each)
            told = (*course.notes, *notices(self.model, each))
            jobs += [
                _Job(len(jobs) + k, call, each.picture(k), course, told) for k in range(each.count)
            ]
        return self._stream(jobs, cancel or Cancel())

    def requests(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        request: GenerateRequest | Sequence[GenerateRequest] | None = None,
        seed: int | Sequence[int] | None = None,
        **arguments: Any,
    ) -> list[GenerateRequest]:
        """What :meth:`generate` would do with these arguments: one resolved request a prompt."""
        if request is not None:
            if prompt is not None or seed is not None or arguments:
                raise InvalidRequest(
                    "request", "comes with other arguments.", "Use request.replace(...)."
                )
            given = [request] if isinstance(request, GenerateRequest) else list(request)
            return [each.resolved(self.model.spec) for each in given]
        if prompt is not None:
            arguments["prompt"] = prompt
        prompts = prompt if isinstance(prompt, list | tuple) else [prompt]
        if not prompts:
            raise InvalidRequest("prompt", "is an empty list.", "Say what the pictures show.")
        seeds = seed if isinstance(seed, list | tuple) else None
        if seeds is not None and len(seeds) != len(prompts):
            raise InvalidRequest("seed", f"{len(seeds)} seeds for {len(prompts)} prompts.")
        resolved: list[GenerateRequest] = []
        for i, words in enumerate(prompts):
            if words is not None:
                arguments["prompt"] = words
            number = seeds[i] if seeds is not None else seed
            if seeds is None and resolved:
                last = resolved[-1]
                number = ((last.seed or 0) + last.count) % (MAX_SEED + 1)
            one = GenerateRequest.from_kwargs(**arguments, seed=number)
            resolved.append(one.resolved(self.model.spec))
        return resolved

    def replay(self, path: str | Path, **pictures: Any) -> provenance.Replay:
        """Make a picture again from its file, and compare. See :func:`provenance.replay`.

        Args:
            pictures: those that it was made from (``image``, ``images``, ``mask``, ``depth``):
                the file holds their digests only.
        """
        return provenance.replay(
            path, lambda request: self.generate(request=request.given(**pictures))
        )

    # -- during ------------------------------------------------------------------------------

    def _stream(self, jobs: list[_Job], cancel: Cancel) -> Iterator[Event]:
        clock = Clock(sum(job.course.calls for job in jobs))
        size = self._micro_batch or _micro_batch(self.model, [job.request for job in jobs])
        for start in range(0, len(jobs), size):
            yield from self._run(_Group(jobs[start : start + size]), clock, cancel)

    def _run(self, group: _Group, clock: Clock, cancel: Cancel) -> Iterator[Event]:
        """One micro-batch, from noise to results."""
        answers: Answers = queue.SimpleQueue()
        waiting = dict.fromkeys(group.jobs)
        self._enter(group)
        try:
            submitted = False
            while waiting:
                try:
                    if cancel.is_set and not submitted:
                        for job in list(waiting):
                            del waiting[job]
                            yield self._result(job, group, Outcome.cancelled, "cancelled")
                        continue
                    if not submitted:
                        self._submit(group, answers)
                        submitted = True
                    yield from self._turn(group, waiting, answers, clock, cancel)
                except KeyboardInterrupt:
                    if cancel.is_set:  # the second one means it
                        raise
                    cancel.set()
        finally:
            for job in group.jobs:
                if job.picture is not None:
                    job.picture.cancel()
            self._leave(group)

    def _submit(self, group: _Group, answers: Answers) -> None:
        for job in group.jobs:
            job.picture = self._picture(job, answers)
        self.engine.submit([job.picture for job in group.jobs if job.picture is not None])

    def _turn(
        self,
        group: _Group,
        waiting: dict[_Job, None],
        answers: Answers,
        clock: Clock,
        cancel: Cancel,
    ) -> Iterator[Event]:
        """Pass on one answer, and whatever has been finished."""
        if cancel.is_set:
            for job in waiting:
                if job.picture is not None:
                    job.picture.cancel()
        # Looked up first: whatever a finished picture had to tell is in the queue by then.
        finished = [j for j in waiting if j.picture is not None and j.picture.done]
        for job, answered in _heard(answers, wait=not finished):
            progress = clock.tick(answered, job.index)
            if not cancel.is_set:
                yield progress
                preview = self._preview(job, answered)
                if preview is not None:
                    yield Preview(preview, job.index, progress.step)
            if answered.index + 1 == answered.total and job.picture is not None:
                job.picture.wait(_POLL)  # its last update is being made
        for job in finished:
            result = self._finish(job, group)
            del waiting[job]
            yield result

    def _picture(self, job: _Job, answers: Answers) -> Picture:
        if job.course.start == "nothing":
            return Picture(_at_once(), (), plain())
        return picture(
            self.model, job.request, job.course, lambda answered: answers.put((job, answered))
        )

    def _preview(self, job: _Job, answered: Answered) -> Image.Image | None:
        every, step = job.request.preview_every, answered.index + 1
        if not every or step % every or step == answered.total:
            return None
        try:
            with torch.inference_mode():
                return _image(_decode(self.model, answered.denoised()))
        except (RuntimeError, MemoryError):  # a preview must never cost the picture
            log.warning("no preview of step %d", step, exc_info=True)
            return None

    # -- after -------------------------------------------------------------------------------

    def _finish(self, job: _Job, group: _Group) -> ImageResult:
        assert job.picture is not None
        if job.course.start == "nothing":  # strength 0 gives the picture back, and says so
            scene = job.course.scene
            message = "strength 0: the picture that was given, in the size asked for"
            image = scene.finished(scene.untouched())
            return self._result(job, group, Outcome.ok, message, image)
        try:
            latents = job.picture.result()
            image, outcome, message = self._develop(latents)
            if image is not None:
                image = job.course.scene.finished(image)
        except Cancelled:
            return self._result(job, group, Outcome.cancelled, "cancelled")
        except NonFinite as error:
            return self._result(job, group, Outcome.nan, f"{error}. {_NAN_FIX}")
        except InvalidRequest:
            raise
        except Exception as error:  # one picture's failure must not cost the others
            log.exception("picture %d failed", job.index)
            return self._result(job, group, Outcome.error, f"{type(error).__name__}: {error}")
        return self._result(job, group, outcome, message, image)

    @torch.inference_mode()
    def _develop(self, latents: Tensor) -> tuple[Image.Image | None, Outcome, str]:
        """Latents to a picture, or why there is none."""
        if not bool(torch.isfinite(latents).all()):
            return None, Outcome.nan, f"the latents are not finite. {_NAN_FIX}"
        pixels = _decode(self.model, latents)
        if bool(torch.isfinite(pixels).all()):
            return _image(pixels), Outcome.ok, ""
        dtype = next(self.model.vae.parameters()).dtype
        if dtype != torch.float32:
            pixels = copy.deepcopy(self.model.vae).float().decode(latents.float())
            if bool(torch.isfinite(pixels).all()):
                name = str(dtype).removeprefix("torch.")
                message = f"the decoder overflowed in {name}; decoded again in float32"
                return _image(pixels), Outcome.nan_recovered, message
        return None, Outcome.nan, f"the decoder's pixels are not finite. {_NAN_FIX}"

    def _result(
        self,
        job: _Job,
        group: _Group,
        outcome: Outcome,
        message: str,
        image: Image.Image | None = None,
    ) -> ImageResult:
        record = provenance.metadata(
            self.model,
            job.request,
            image,
            outcome=outcome,
            message=message,
            notices=job.notices,
            batch=_place(job, group),
        )
        return ImageResult(
            image=image,
            seed=job.request.seed or 0,
            outcome=outcome,
            request=job.request,
            message=message,
            metadata=record,
            notices=job.notices,
            index=job.index,
        )

    def _enter(self, group: _Group) -> None:
        with self._lock:
            for other in self._groups:
                other.mixed = group.mixed = True
            self._groups.append(group)

    def _leave(self, group: _Group) -> None:
        with self._lock:
            self._groups.remove(group)


def _at_once() -> Solver:
    """A run that asks nothing."""
    return torch.zeros(0)
    yield


def _heard(answers: Answers, *, wait: bool) -> Iterator[tuple[_Job, Answered]]:
    """One answer, if it comes within a moment; or all that are there."""
    try:
        yield answers.get(block=wait, timeout=_POLL)
        while not wait:
            yield answers.get_nowait()
    except queue.Empty:
        return


def _micro_batch(model: Model, requests: Sequence[GenerateRequest]) -> int:
    """How many pictures share a call: many small ones, on a CPU one of 512 pixels a side, so that
    the first picture is there early."""
    side = model.spec.vae.factor
    cells = max((r.width or 0) * (r.height or 0) for r in requests) // side**2
    budget = 4096 if model.device.type == "cpu" else 65536
    return max(1, min(16, budget // max(1, cells)))


def _place(job: _Job, group: _Group) -> tuple[int, int, bool]:
    """(index, size, alike) for :func:`provenance.metadata`."""
    if job.request.deterministic:
        return 0, 1, True
    alike = not group.mixed and all(other.call == job.call for other in group.jobs)
    return group.jobs.index(job), len(group.jobs), alike


def _decode(model: Model, latents: Tensor) -> Tensor:
    """Alone, whatever the batch: the decoder adds no difference between batches."""
    return model.runtime.decode(latents.to(next(model.vae.parameters()).dtype))


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(to_uint8(pixels)[0].cpu().numpy())
