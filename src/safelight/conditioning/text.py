"""Prompts to tokens, and to the program of a run.

The unpooled states of the text tower, after its final norm, are what cross-attention reads
(Rombach et al. 2022, section 3.3). A prompt longer than one window is encoded window by window
and concatenated; nothing is cut. What a weight does to a state is the dialect's: A1111 multiplies
states and restores their mean; compel moves them away from the empty prompt's, and for weights
below 1 mixes in the states of a tower that does not see the words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.conditioning.slots import Conditioning, pad_tokens
from safelight.diffusion import guidance
from safelight.errors import InvalidRequest
from safelight.text.prompt import Clause, Fragments, Prompt, Text
from safelight.text.windows import MANNERS

if TYPE_CHECKING:
    from safelight.model import Model
    from safelight.text.tokenizer import Chunk

_EMPTY = Text.of(("", 1.0))
_FAINTEST = 1e-5  # a weight of 0 would mix with an infinite share


def encode_prompts(
    model: Model, prompts: Sequence[str | Text], *, clip_skip: int = 0
) -> list[Conditioning]:
    """Encode prompts that will share network calls: all get equally many tokens.

    Equal texts of one model are encoded once, and stay the same tensors as long as they are
    remembered.

    Args:
        model: with a text tower and a tokenizer.
        prompts: plain strings, or texts of a dialect (:func:`safelight.text.weighting.parse`).
        clip_skip: layers left out at the end of the text tower (diffusers' count).

    Raises:
        InvalidRequest: the model has no text tower.
    """
    if model.text is None or model.tokenizer is None:
        raise InvalidRequest("prompt", f"{model.spec.name} does not read text.")
    if not 0 <= clip_skip < model.text.spec.layers:
        raise InvalidRequest(
            "clip_skip", f"{clip_skip}.", f"This text tower has {model.text.spec.layers} layers."
        )
    texts = [Text.of((p, 1.0)) if isinstance(p, str) else p for p in prompts]
    encoder = _Encoder(model, clip_skip)
    longest = max(len(encoder.states(text)) for text in texts)
    return [Conditioning(encoder.states(text, longest)) for text in texts]


class _Encoder:
    """Texts to states; what has been encoded once is looked up."""

    def __init__(self, model: Model, skip: int) -> None:
        self.model, self.skip = model, skip

    @torch.inference_mode()
    def states(self, text: Text, length: int = 0) -> Tensor:
        """``(S, width)``, lengthened to ``length`` with windows of the empty prompt."""
        key = (text, self.skip, length)
        known = self.model.text_cache.get(key)
        if known is None:
            if length:
                plain = self.states(text)
                if len(plain) == length:
                    return plain
                known = pad_tokens(plain, length, self.states(_EMPTY))
            elif text.dialect == "compel":
                known = self._compel(text)
            else:
                known = self._a1111(text)
            self.model.text_cache.put(key, known)
        return known

    def _a1111(self, text: Text) -> Tensor:
        """States times weights; then the mean of the whole prompt is what it was."""
        chunks = [c for clause in text.clauses for c in self._chunks(text, clause.blend[0][0])]
        states = self._tower(chunks)
        weights = self._weights(chunks)
        if bool((weights != 1).any()):
            weighted = states.float() * weights[:, :, None]
            states = (weighted * (states.float().mean() / weighted.mean())).to(states.dtype)
        return states.flatten(0, 1)

    def _compel(self, text: Text) -> Tensor:
        """Clauses one behind the other."""
        return torch.cat([self._clause(text, clause) for clause in text.clauses])

    def _clause(self, text: Text, clause: Clause) -> Tensor:
        """Mixed, then pulled towards the empty prompt."""
        mixed = [self._weighted(text, fragments) for fragments, _ in clause.blend]
        longest, empty = max(len(states) for states in mixed), self.states(_EMPTY)
        shares = [share for _, share in clause.blend]
        if shares == [1.0] and clause.weight == 1:
            return mixed[0]
        padded = [pad_tokens(states, longest, empty).float() for states in mixed]
        out = sum(
            (states * share for states, share in zip(padded, shares, strict=True)),
            torch.zeros_like(padded[0]),
        )
        if clause.weight != 1:
            nothing = empty.float().repeat(longest // len(empty), 1)
            out = nothing + clause.weight * (out - nothing)
        return out.to(mixed[0].dtype)

    def _weighted(self, text: Text, fragments: Fragments) -> Tensor:
        """compel's weights: away from the empty prompt above 1, half unseen at 1/2.

        A fragment of weight w < 1 adds the states of a tower that does not see it, with the
        share tan((1 - w) π/2); shares, 1 of the plain states among them, are then made to add up
        to 1. Windows are encoded by themselves, so those without the fragment stay as they are.
        """
        chunks = self._chunks(text, fragments)
        weights, plain = self._weights(chunks)[:, :, None], self._tower(chunks)
        if bool((weights == 1).all()):
            return plain.flatten(0, 1)
        empty = self.states(_EMPTY).float()
        sources = torch.tensor([chunk.sources for chunk in chunks], device=self.model.device)

        def pulled(states: Tensor, rows: Tensor | slice) -> Tensor:
            states, w = states.float(), weights[rows]
            return torch.where(w == 1, states, empty + w * (states - empty))

        every = pulled(plain, slice(None))
        out, total = every.clone(), 1.0
        for index, (_, weight) in enumerate(fragments):
            rows = (sources == index).any(dim=1)
            if weight >= 1 or not bool(rows.any()):
                continue
            share = math.tan((1 - max(weight, _FAINTEST)) * math.pi / 2)
            part = [chunk for chunk, hit in zip(chunks, rows.tolist(), strict=True) if hit]
            unseen = self._tower(part, sources[rows] != index)
            out[~rows] += share * every[~rows]
            out[rows] += share * pulled(unseen, rows)
            total += share
        return (out / total).to(plain.dtype).flatten(0, 1)

    def _chunks(self, text: Text, fragments: Fragments) -> list[Chunk]:
        assert self.model.tokenizer is not None
        return self.model.tokenizer.weighted_chunks(fragments, MANNERS[text.dialect])

    def _weights(self, chunks: Sequence[Chunk]) -> Tensor:
        return torch.tensor([chunk.weights for chunk in chunks], device=self.model.device)

    def _tower(self, chunks: Sequence[Chunk], seen: Tensor | None = None) -> Tensor:
        """``(windows, context_length, width)``."""
        assert self.model.text is not None
        ids = torch.tensor([chunk.ids for chunk in chunks], device=self.model.device)
        return self.model.text(ids, skip=self.skip, seen=seen).states


# -- the program of a run -------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """Which texts a run reads, and the program that says when.

    Args:
        texts: each once; the first ``negatives`` of them are unconditional, and branch k is text
            k. There is always a branch 0 and a branch 1.
        negatives: at least 1.
        program: for these branches.
        unguided: the same at a guidance scale of 1.
    """

    texts: tuple[Text, ...]
    negatives: int
    program: guidance.Program
    unguided: guidance.Program


def script(
    prompt: Prompt,
    negative: Prompt,
    steps: int,
    scale: float,
    low: float = 0.0,
    high: float = math.inf,
    share: float = 1.0,
    *,
    guided: bool = True,
) -> Script:
    """Lay out a run: guidance, its interval, and what the prompts do from step to step.

    Args:
        steps: sampling steps; a sampler that asks several times a step reads one text at it.
        scale, low, high, share: as for :func:`safelight.diffusion.guidance.program`.
        guided: False for a student that was distilled from guidance: one branch, the prompt.

    Raises:
        InvalidRequest: ``AND`` for a model that cannot add prompts; whatever
            :meth:`safelight.text.prompt.Part.texts` finds.
    """
    parts = [part.texts(steps) for part in prompt.parts]
    weights = [part.weight for part in prompt.parts]
    if not guided and len(parts) > 1:
        raise InvalidRequest(
            "prompt", "joins prompts by AND; this model has guidance built in.", "Give it one."
        )
    alone = len(parts) == 1 and (scale <= 1 or not guided)
    # A long negative prompt that is not read must not lengthen the others.
    against = parts[0] if alone else negative.parts[0].texts(steps)
    negatives = tuple(dict.fromkeys(against))
    positives = tuple(dict.fromkeys(text for step in zip(*parts, strict=True) for text in step))
    place = {text: len(negatives) + k for k, text in enumerate(positives)}
    known: dict[object, tuple[guidance.Program, guidance.Program]] = {}
    programs: list[tuple[guidance.Program, guidance.Program]] = []
    for step in range(steps):
        said: dict[int, float] = {}
        for part, weight in zip(parts, weights, strict=True):
            branch = place[part[step]]
            said[branch] = said.get(branch, 0.0) + weight
        away = negatives.index(against[step])
        key = (away, *said.items())
        if key not in known:
            if alone:
                one = two = guidance.plain(next(iter(said)))
            else:
                one = guidance.program(scale, low, high, share, prompts=said, unconditional=away)
                two = guidance.composed(1.0, said, unconditional=away)
            known[key] = one, two
        programs.append(known[key])
    one, two = programs[0]
    if len(known) > 1:
        one, two = (guidance.by_step([each[side] for each in programs]) for side in (0, 1))
    return Script((*negatives, *positives), len(negatives), one, two)
