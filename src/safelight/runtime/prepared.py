"""What the engine calls: a model's networks, prepared, and what they remember between calls."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from safelight.conditioning import Conditioning
from safelight.errors import InvalidRequest
from safelight.nets.vae import VAE, Posterior
from safelight.runtime import caching
from safelight.runtime.attention import Read
from safelight.runtime.caching import Use
from safelight.runtime.plan import Plan, choose
from safelight.runtime.tiny_decoder import FusedTinyDecoder
from safelight.runtime.unet import FusedUNet
from safelight.runtime.vae import FusedDecoder, FusedEncoder
from safelight.store.pages import release

if TYPE_CHECKING:
    from safelight.model import Model

_READ_BYTES = 2**28
"""What the keys and values of all remembered prompts may take."""
_STACK_BYTES = 2**26
"""What those of one call's rows may take to be kept for the next tick."""


class Row(NamedTuple):
    """One branch of one picture in a network call."""

    x: Tensor
    """``(1, C, h, w)`` noisy latents. Branches of one picture share this very tensor."""
    timestep: float
    conditioning: Conditioning
    use: Use | None = None
    """What it remembers from call to call; rows of one call have the same ``kind``."""


class _Layout(NamedTuple):
    """The order of a call's rows in which those of one context are next to each other."""

    order: list[int]
    back: Tensor | None
    """Index of the way back; None where the order is the one asked in."""
    reads: list[list[Read]]
    """For every cross-attention."""


def prepare(model: Model, plan: Plan | None = None, *, like: Prepared | None = None) -> Prepared:
    """Lay a model out for its machine.

    Args:
        plan: what to do; None for what :func:`safelight.runtime.plan.choose` chooses.
        like: a prepared model whose autoencoder is the same: what is laid out of it is shared.
    """
    return Prepared(model, choose(model) if plan is None else plan, like)


class Prepared:
    """A model's networks as they run. Safe to share between threads.

    Whoever changes a network's numbers afterwards must prepare it again; hooks on it or its
    parts (adapters, taps) are noticed at each call, and the network itself runs.
    """

    def __init__(self, model: Model, plan: Plan, like: Prepared | None = None) -> None:
        from safelight.model import Cache

        self.plan = plan
        self._unet, self._vae = model.unet, model.vae
        self._device = model.device
        self._phase = ""
        self._phases = {"read": model.text, "predict": model.unet, "decode": model.vae}
        self._fused_unet: FusedUNet | None = None
        self._fused_decoder: FusedDecoder | None = None
        self._fused_encoder: FusedEncoder | None = None
        self._tiny = model.tiny_decoder
        self._fused_tiny: FusedTinyDecoder | None = None
        self._unet_parts = tuple(model.unet.modules())
        self._vae_parts = tuple(model.vae.modules())
        if plan.fused:
            _keep_pages()
            with torch.no_grad():
                self._fused_unet = FusedUNet(model.unet, plan)
                if like is not None and like._vae is model.vae:
                    self._fused_decoder = like._fused_decoder
                    self._fused_encoder = like._fused_encoder
                else:
                    self._fused_decoder = FusedDecoder(model.vae, plan)
        # An entry holds the tensors whose identity is its key, so that no other can take it.
        self._times: Cache[tuple[object, list[Tensor]]] = Cache(256)
        self._reads: Cache[tuple[object, list[Read]]] = Cache(_remembered(model))
        self._layouts: Cache[tuple[object, _Layout]] = Cache(4)

    @torch.inference_mode()
    def predict(self, rows: Sequence[Row]) -> Tensor:
        """Answer rows of equal shape with one network call: ``(N, out_channels, h, w)``."""
        self._enter("predict")
        unet = self._fused_unet
        if unet is None or _touched(self._unet_parts):
            return self._plain(rows)
        layout = self._laid_out(unet, [row.conditioning.tokens for row in rows])
        ordered = [rows[k] for k in layout.order]
        how = caching.first_of([row.use for row in rows])
        if how is None:
            answer = self._fused(unet, ordered, layout.reads)
        else:
            answer = self._remembering(unet, ordered, layout.reads, how)
        return answer if layout.back is None else answer.index_select(0, layout.back)

    def _fused(
        self, unet: FusedUNet, rows: Sequence[Row], reads: Sequence[Sequence[Read]]
    ) -> Tensor:
        # Rows that differ in their tokens alone are one until these are first read.
        slots: dict[object, int] = {}
        firsts: list[Row] = []
        places: list[int] = []
        for row in rows:
            key = _until_context(row) if self.plan.shared else len(places)
            places.append(slots.setdefault(key, len(slots)))
            if len(slots) > len(firsts):
                firsts.append(row)
        times, alike = self._time_of(unet, firsts)
        x, uses = _latents(firsts), [row.use for row in rows]
        taps = caching.taps_of(uses)
        if len(firsts) == len(rows):
            answer = unet(x, times, reads, taps=taps)
        else:
            index = torch.tensor(places, device=x.device)
            first = None if alike else times
            times = times if alike else [time.index_select(0, index) for time in times]
            spread = lambda t: _spread(t, index)  # noqa: E731
            answer = unet(x, times, reads, spread=spread, first_times=first, taps=taps)
        caching.keep(uses, taps)
        return answer

    def _remembering(
        self, unet: FusedUNet, rows: Sequence[Row], reads: Sequence[Sequence[Read]], how: Use
    ) -> Tensor:
        """A call of rows that all read, or write, what they remember; ``how`` is of their kind."""
        uses = [row.use for row in rows if row.use is not None]
        times, _ = self._time_of(unet, rows)
        watches = [caching.Watch(read) for read in reads] if how.watch else []
        stands = watches or (caching.frozen(uses) if how.frozen else reads)
        route = deep = None
        if how.short and how.branch is not None:
            route, deep = unet.route(how.branch), caching.deep_of(uses)
            times = [times[k] for k in route.resnets]
            stands = [stands[k] for k in route.crosses]
        taps = caching.taps_of(uses)
        answer = unet(_latents(rows), times, stands, taps=taps, route=route, deep=deep)
        caching.keep(uses, taps)
        if how.watch:
            caching.watched(uses, watches)
        return answer

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to pixels, as :meth:`safelight.nets.vae.VAE.decode`."""
        self._enter("decode")
        if self._fused_decoder is None or _touched(self._vae_parts):
            return self._vae.decode(latents)
        return self._fused_decoder(latents)

    @torch.inference_mode()
    def sketch(self, latents: Tensor) -> Tensor:
        """:meth:`decode` by the model's tiny decoder: not the same pixels, at a fraction of the
        cost.

        Raises:
            InvalidRequest: it has none.
        """
        tiny = self._tiny
        if tiny is None:
            raise InvalidRequest("decoder", "this model has no tiny one.", "Leave it out.")
        if not self.plan.fused:
            return tiny(latents)
        if self._fused_tiny is None:
            with torch.no_grad():
                self._fused_tiny = FusedTinyDecoder(tiny, self.plan)
        return self._fused_tiny(latents)

    @torch.inference_mode()
    def decoding(self, latents: Tensor) -> Generator[None, None, Tensor]:
        """:meth:`decode` in pieces: yields between them, returns the same pixels."""
        self._enter("decode")
        vae = self._vae
        if _touched(self._vae_parts) or not isinstance(vae, VAE):
            return vae.decode(latents)
        yield
        return (yield from (self._fused_decoder or vae).decoding(latents))

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Posterior:
        """Pixels to the posterior over latents, as :meth:`safelight.nets.vae.VAE.encode`."""
        if not self.plan.fused or _touched(self._vae_parts):
            return self._vae.encode(pixels)
        if self._fused_encoder is None:  # few requests bring a picture
            self._fused_encoder = FusedEncoder(self._vae, self.plan)
        return self._fused_encoder(pixels)

    def _enter(self, phase: str) -> None:
        """Where memory is short, only the network at work has its pages in memory."""
        if self.plan.halved and phase != self._phase:
            self._phase = phase
            for name, net in self._phases.items():
                if name != phase and net is not None:
                    release(*(each.detach() for each in net.parameters()))

    # -- remembered --------------------------------------------------------------------------

    def _time_of(self, unet: FusedUNet, rows: Sequence[Row]) -> tuple[list[Tensor], bool]:
        """Time projections, and whether one does for all rows."""
        found: dict[object, list[Tensor]] = {}
        each = []
        for row in rows:
            vector, guidance = row.conditioning.vector, row.conditioning.guidance
            key = (row.timestep, id(vector), id(guidance))
            if key not in found:
                known = self._times.get(key)
                if known is None:
                    # One at a time: the company of other pictures must not move the last bit.
                    known = (vector, guidance), unet.time(row.timestep, vector, guidance)
                    self._times.put(key, known)
                found[key] = known[1]
            each.append(found[key])
        if len(found) == 1:
            return each[0], True
        return [torch.cat(parts) for parts in zip(*each, strict=True)], False

    def _laid_out(self, unet: FusedUNet, tokens: Sequence[Tensor]) -> _Layout:
        """Rows by context. The rows of a batch stay the same for many ticks."""
        key = tuple(id(each) for each in tokens)
        known = self._layouts.get(key)
        if known is not None:
            return known[1]
        readers: dict[int, list[int]] = {}
        for k, name in enumerate(key):
            readers.setdefault(name, []).append(k)
        # Contexts with equally many rows go together: one prompt in sixteen pictures, or sixteen
        # prompts and the one empty prompt of all.
        alike: dict[int, list[list[int]]] = {}
        for places in readers.values():
            alike.setdefault(len(places), []).append(places)
        order = [k for groups in alike.values() for places in groups for k in places]
        stacks = []
        for groups in alike.values():
            each = [self._read(unet, tokens[places[0]]) for places in groups]
            rows = sum(map(len, groups))
            stacks.append([_stack_reads(parts, rows) for parts in zip(*each, strict=True)])
        back = None
        if order != sorted(order):
            back = torch.tensor(order, device=self._device).argsort()
        layout = _Layout(order, back, [list(parts) for parts in zip(*stacks, strict=True)])
        size = sum(4 * t.numel() for reads in layout.reads for r in reads for t in r[:2])
        if size <= _STACK_BYTES:
            self._layouts.put(key, (tuple(tokens), layout))
        return layout

    def _read(self, unet: FusedUNet, tokens: Tensor) -> list[Read]:
        known = self._reads.get(id(tokens))
        if known is None:
            known = tokens, unet.read(tokens)
            self._reads.put(id(tokens), known)
        return known[1]

    # -- the networks as they are ------------------------------------------------------------

    def _plain(self, rows: Sequence[Row]) -> Tensor:
        t = torch.tensor([row.timestep for row in rows], device=self._device)
        tokens = torch.stack([row.conditioning.tokens for row in rows])
        vectors = [row.conditioning.vector for row in rows]
        guides = [row.conditioning.guidance for row in rows]
        told = (_latents(rows), t, tokens, _stack(vectors), _stack(guides))
        uses = [row.use for row in rows]
        if not any(uses):
            return self._unet(*told)
        how = caching.first_of(uses)
        if how is not None and (how.watch or how.frozen):
            raise InvalidRequest(
                "freeze_context",
                "works where the network is laid out for the machine: float32 on a CPU, no taps.",
                "Leave it out; guidance_until alone saves most of it.",
            )
        branch = how.branch if how is not None and how.short else None
        deep = None if branch is None else caching.deep_of([use for use in uses if use is not None])
        taps = caching.taps_of(uses)
        answer = caching.plain(self._unet, *told, taps=taps, branch=branch, deep=deep)
        caching.keep(uses, taps)
        return answer


def _keep_pages() -> None:
    """Have glibc keep freed memory for the next layer instead of giving it back each time.

    It gives back what lies free at the top beyond twice the largest block it has seen mapped and
    freed, up to 32 MiB. Large weights are such blocks; a small network's are not, and every few
    layers the system would clear the same pages again: a sixth of the time of sixteen pictures.
    """
    torch.empty(32 * 10**6, dtype=torch.uint8)


def _until_context(row: Row) -> object:
    """Equal for rows that are the same until the context is read."""
    told = row.conditioning
    return (
        id(row.x),
        row.timestep,
        id(told.planes),
        id(told.vector),
        id(told.guidance),
    )


def _latents(rows: Sequence[Row]) -> Tensor:
    x = torch.cat([row.x for row in rows])
    planes = _stack([row.conditioning.planes for row in rows])
    return x if planes is None else torch.cat([x, planes.to(x)], dim=1)


def _stack(slots: Sequence[Tensor | None]) -> Tensor | None:
    """Rows of one call have the same slots."""
    given = [slot for slot in slots if slot is not None]
    return torch.stack(given) if given else None


def _stack_reads(parts: Sequence[Read], rows: int) -> Read:
    if len(parts) == 1:
        return parts[0]._replace(rows=rows)
    return Read(torch.cat([p.first for p in parts]), torch.cat([p.second for p in parts]), rows)


def _spread(t: Tensor, index: Tensor) -> Tensor:
    """Copy rows out: ``(N, L, C)``, or ``(N, C, H, W)`` in channels-last memory."""
    if t.ndim < 4:
        return t.index_select(0, index)
    return t.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)


def _touched(parts: Sequence[nn.Module]) -> bool:
    """Whether a hook would be missed."""
    return any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts
    )


def _remembered(model: Model) -> int:
    """How many prompts' keys and values to keep."""
    spec = model.spec.unet
    layers = [
        width * (2 * spec.layers_per_block + 1 + (level == len(spec.channels) - 1))
        for level, width in enumerate(spec.channels)
    ]
    tokens = 77 if model.spec.text is None else model.spec.text.context_length
    return max(4, min(256, _READ_BYTES // (8 * tokens * sum(layers))))
