"""The river: request -> conditioning -> ticks of the engine -> latents -> pixels -> results.

Picture k of seed s is picture 0 of seed s + k. Pictures share network calls in micro-batches, whose
size hangs on the pictures' size alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from safelight import provenance
from safelight.adapters import Adaptation, Adapters
from safelight.diffusion.guidance import plain
from safelight.diffusion.solvers import Solver
from safelight.engine import Engine, NonFinite, Picture
from safelight.engine import Progress as Answered
from safelight.errors import Cancelled, InvalidRequest
from safelight.generate import guard, thrift
from safelight.generate.course import Course, notices, picture, plot
from safelight.generate.develop import NAN_FIX, decode, develop, sketch, to_image
from safelight.generate.events import Cancel, Clock, Event, Preview
from safelight.model import Model
from safelight.names import DEFAULT_MODEL
from safelight.request import MAX_SEED, GenerateRequest, ImageResult, Outcome
from safelight.safety import Moderation
from safelight.store.registry import Registry
from safelight.text import weighting
from safelight.verdict import Moderated

log = logging.getLogger(__name__)

_POLL = 0.02  # seconds between looks at the cancel token while nothing happens

Folders = str | Path | Sequence[str | Path] | Registry | None
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
    adaptation: Adaptation
    picture: Picture | None = None
    moderation: tuple[Moderated, ...] = ()
    cheaper: tuple[str, ...] = ()
    """What was done with less, after memory had run out."""


@dataclass(eq=False)
class _Group:
    """A micro-batch; ``mixed`` when another call's pictures may have shared its network calls."""

    jobs: list[_Job]
    mixed: bool = False
    starved: list[_Job] = field(default_factory=list)
    """Those for which memory ran out the first time."""


def load(
    name: str | Path = DEFAULT_MODEL,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    moderation: Moderation | None = None,
    lora_dir: Folders = None,
    embedding_dir: Folders = None,
    **options: Any,
) -> Generator:
    """Load a model by shipped name, folder, file or hub id.

    Args:
        moderation: whom to ask about prompts and pictures; see :mod:`safelight.safety`.
        lora_dir, embedding_dir: as for :class:`Generator`.
        options: those of :meth:`safelight.model.Model.load`.
    """
    loras, embeddings = registries(lora_dir, embedding_dir)
    model = Model.load(name, device=device, dtype=dtype, **options)
    return Generator(model, moderation=moderation, lora_dir=loras, embedding_dir=embeddings)


def registries(lora_dir: Folders = None, embedding_dir: Folders = None) -> tuple[Registry, ...]:
    """Where names of LoRAs and of textual inversions are looked up."""
    return tuple(
        given if isinstance(given, Registry) else Registry(given, kind=kind, option=option)
        for given, kind, option in (
            (lora_dir, "LoRA", "--lora-dir"),
            (embedding_dir, "embedding", "--embedding-dir"),
        )
    )


class Generator:
    """A loaded model that makes pictures. Safe to call from many threads.

    Args:
        micro_batch: most pictures that share a network call; None chooses by their size.
        moderation: whom to ask about prompts and pictures.
        lora_dir: folders whose files requests may name in ``loras``, or a registry of them.
        embedding_dir: the same for ``embeddings``.
    """

    def __init__(
        self,
        model: Model,
        *,
        micro_batch: int | None = None,
        moderation: Moderation | None = None,
        lora_dir: Folders = None,
        embedding_dir: Folders = None,
    ) -> None:
        self.model, self.moderation = model, moderation
        self.engine = Engine(model)
        self.adapters = Adapters(model, *registries(lora_dir, embedding_dir))
        self.micro_batch = micro_batch
        self.breathe: Callable[[], object] = self.engine.interleave
        """Called between pieces of a picture's decoding: whoever is live goes on meanwhile."""
        self.batch_cells: int | None = None
        """Latent cells of the pictures that share a call, where the device has been measured."""
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
            guard.check(self.model, each)
            named = weighting.extract_loras(each.prompt, each.weighting)[1]
            adaptation = self.adapters.plan(each.replace(loras=(*each.loras, *named)))
            course = plot(self.model, each)
            heard = notices(self.adapters.reader(adaptation), each)
            told = (*course.notes, *heard, *adaptation.notes)
            jobs += [
                _Job(len(jobs) + k, call, each.picture(k), course, told, adaptation)
                for k in range(each.count)
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
        requests = [job.request for job in jobs]
        size = self.micro_batch or micro_batch(self.model, requests, self.batch_cells)
        refused = self._refused(jobs) if not cancel.is_set else {}
        for job, reason in refused.items():
            yield self._result(job, _Group([job]), Outcome.rejected, reason)
        jobs = [job for job in jobs if job not in refused]
        # One adapted model at a time, however many a call's requests ask for.
        for _, group in itertools.groupby(jobs, lambda job: job.adaptation.key):
            alike = list(group)
            for start in range(0, len(alike), size):
                yield from self._whole(_Group(alike[start : start + size]), clock, cancel)

    def _whole(self, group: _Group, clock: Clock, cancel: Cancel) -> Iterator[Event]:
        """A micro-batch, and again what ran out of memory in it."""
        yield from self._run(group, clock, cancel)
        for job in group.starved:  # once more, alone and one branch at a time
            job.picture, job.cheaper = None, ("rows",)
            yield from self._run(_Group([job]), clock, cancel)

    def _refused(self, jobs: Sequence[_Job]) -> dict[_Job, str]:
        """The jobs whose prompt the moderator removes, each prompt asked about once."""
        if self.moderation is None or not self.moderation.prompts:
            return {}
        said: dict[str, Moderated] = {}
        for job in jobs:
            text = job.request.prompt
            if text not in said:
                said[text] = self.moderation.of_prompt(text)
            job.moderation = (said[text],)
        return {job: job.moderation[0].reason for job in jobs if job.moderation[0].removed}

    def _run(self, group: _Group, clock: Clock, cancel: Cancel) -> Iterator[Event]:
        """One micro-batch, from noise to results."""
        answers: Answers = queue.SimpleQueue()
        waiting = dict.fromkeys(group.jobs)
        self._enter(group)
        try:
            engine: Engine | None = None
            while waiting:
                try:
                    if cancel.is_set and engine is None:
                        for job in list(waiting):
                            del waiting[job]
                            yield self._result(job, group, Outcome.cancelled, "cancelled")
                        continue
                    if engine is None:
                        try:
                            engine = self._submit(group, answers, lambda: cancel.is_set)
                        except Exception as error:
                            yield from self._starve(group, waiting, error)
                            continue
                    yield from self._turn(engine, group, waiting, answers, clock, cancel)
                except KeyboardInterrupt:
                    if cancel.is_set:  # the second one means it
                        raise
                    cancel.set()
        finally:
            if engine is not None:
                engine.abandon([job.picture for job in group.jobs if job.picture is not None])
            self._leave(group)

    def _submit(self, group: _Group, answers: Answers, cancelled: Callable[[], bool]) -> Engine:
        cheaper = any(job.cheaper for job in group.jobs)
        engine = Engine(self.model, max_rows=1) if cheaper else self.engine
        for job in group.jobs:
            job.picture = self._picture(job, answers)
            job.picture.unwanted = cancelled
        engine.submit([job.picture for job in group.jobs if job.picture is not None])
        return engine

    def _turn(
        self,
        engine: Engine,
        group: _Group,
        waiting: dict[_Job, None],
        answers: Answers,
        clock: Clock,
        cancel: Cancel,
    ) -> Iterator[Event]:
        """Work on, and pass on what was answered and finished."""
        if cancel.is_set:
            for job in waiting:
                if job.picture is not None:
                    job.picture.cancel()
        # Another call on this thread, or another thread, may have made the last tick.
        ready = any(job.picture is not None and job.picture.done for job in waiting)
        worked = ready or not answers.empty() or engine.advance()
        # Looked up first: whatever a finished picture had to tell is in the queue by then.
        finished = [j for j in waiting if j.picture is not None and j.picture.done]
        for job, answered in _heard(answers, wait=not worked and not finished):
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
            if result is not None:
                yield result

    def _starve(
        self, group: _Group, waiting: dict[_Job, None], error: Exception
    ) -> Iterator[ImageResult]:
        """Memory ran out before anything was submitted."""
        if not thrift.is_out_of_memory(error):
            raise error
        for job in list(waiting):
            del waiting[job]
            result = self._starved(job, group, error)
            if result is not None:
                yield result

    def _starved(self, job: _Job, group: _Group, error: Exception) -> ImageResult | None:
        """Memory ran out: to be tried once more, or the result where it has been."""
        thrift.relieve(error)
        if job.cheaper:
            return self._result(job, group, Outcome.out_of_memory, thrift.AGAIN)
        group.starved.append(job)
        return None

    def _picture(self, job: _Job, answers: Answers) -> Picture:
        model = self.adapters.model(job.adaptation)
        if job.course.start == "nothing":
            return Picture(_at_once(), (), plain())
        made = picture(
            model, job.request, job.course, lambda answered: answers.put((job, answered))
        )
        made.model = model
        return made

    def _preview(self, job: _Job, answered: Answered) -> Image.Image | None:
        every, step = job.request.preview_every, answered.index + 1
        if not every or step % every or step == answered.total:
            return None
        try:
            with torch.inference_mode():
                latents = answered.denoised()
                if self.model.tiny_decoder is not None and job.request.decoder != "full":
                    image = to_image(sketch(self.model, latents))
                else:
                    image = to_image(decode(self.model, latents, self.breathe))
            return guard.preview(self.model, job.request, image, self.moderation)
        except (RuntimeError, MemoryError):  # a preview must never cost the picture
            log.warning("no preview of step %d", step, exc_info=True)
            return None

    # -- after -------------------------------------------------------------------------------

    def _finish(self, job: _Job, group: _Group) -> ImageResult | None:
        """The result; None when memory ran out and the job is to be tried once more."""
        assert job.picture is not None
        if job.course.start == "nothing":  # strength 0 gives the picture back, and says so
            scene = job.course.scene
            message = "strength 0: the picture that was given, in the size asked for"
            image = scene.finished(scene.untouched())
            given = guard.Shown(image, Outcome.ok, message, moderation=job.moderation)
            shown = guard.show(self.model, job.request, given, self.moderation)
            return self._result(job, group, shown.outcome, shown.message, shown)
        try:
            latents = job.picture.result()
            tiny = job.request.decoder == "tiny"
            developed, tiled = develop(self.model, latents, self.breathe, tiny=tiny)
            if developed.image is not None:
                image = job.course.scene.finished(developed.image)
                developed = dataclasses.replace(developed, image=image)
            job.cheaper += ("tiles",) if tiled else ()
            developed = dataclasses.replace(developed, moderation=job.moderation)
            shown = guard.show(self.model, job.request, developed, self.moderation)
        except Cancelled:
            return self._result(job, group, Outcome.cancelled, "cancelled")
        except NonFinite as error:
            return self._result(job, group, Outcome.nan, f"{error}. {NAN_FIX}")
        except InvalidRequest:
            raise
        except Exception as error:  # one picture's failure must not cost the others
            if thrift.is_out_of_memory(error):
                return self._starved(job, group, error)
            log.exception("picture %d failed", job.index)
            return self._result(job, group, Outcome.error, f"{type(error).__name__}: {error}")
        return self._result(job, group, shown.outcome, shown.message, shown)

    def _result(
        self,
        job: _Job,
        group: _Group,
        outcome: Outcome,
        message: str,
        shown: guard.Shown | None = None,
    ) -> ImageResult:
        image = None if shown is None else shown.image
        verdict = guard.unseen(self.model, job.request) if shown is None else shown.safety
        moderation = job.moderation if shown is None else shown.moderation
        notices = (*job.notices, thrift.TOLD) if job.cheaper and image else job.notices
        record = provenance.metadata(
            self.model,
            self.adapters.public(job.request),
            image,
            outcome=outcome,
            message=message,
            notices=notices,
            batch=_place(job, group),
            cheaper=job.cheaper,
            safety=verdict,
            moderation=moderation,
        )
        if job.adaptation.record:
            record["adapters"] = job.adaptation.record
        return ImageResult(
            image=image,
            seed=job.request.seed or 0,
            outcome=outcome,
            request=job.request,
            message=message,
            metadata=record,
            notices=notices,
            index=job.index,
            safety=verdict,
            moderation=moderation,
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
    """All answers that are there, after waiting a moment for the first."""
    try:
        yield answers.get(block=wait, timeout=_POLL)
        while True:
            yield answers.get_nowait()
    except queue.Empty:
        return


def micro_batch(
    model: Model, requests: Sequence[GenerateRequest], measured: int | None = None
) -> int:
    """How many pictures share a call: eight of 128 pixels a side on a CPU, where more gain nothing,
    and one of 512, so that the first picture is there early. Or as many as fill ``measured``
    latent cells."""
    side = model.spec.vae.factor
    cells = max((r.width or 0) * (r.height or 0) for r in requests) // side**2
    budget = measured or (2048 if model.device.type == "cpu" else 65536)
    return max(1, min(16, budget // max(1, cells)))


def _place(job: _Job, group: _Group) -> tuple[int, int, bool]:
    """(index, size, alike) for :func:`provenance.metadata`."""
    if job.request.deterministic:
        return 0, 1, True
    alike = not group.mixed and all(other.call == job.call for other in group.jobs)
    return group.jobs.index(job), len(group.jobs), alike
