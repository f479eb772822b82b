"""What prompts become: compel's weights against the package itself, A1111's by their formula."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conditioning.compel_reference import (
    GOLDEN,
    LAYERS,
    PROMPTS,
    SPEC,
    compel_states,
    deterministic,
    digest,
    tower,
)
from micro_models import micro_model
from safelight.conditioning import encode_prompts
from safelight.errors import InvalidRequest
from safelight.model import Cache
from safelight.nets.clip import TextTower
from safelight.text.counting import text_windows
from safelight.text.prompt import Clause, Text
from safelight.text.weighting import DIALECTS, parse

assert SPEC is not None
TOWER = deterministic(TextTower(SPEC).eval())
L = SPEC.context_length


@pytest.fixture
def model():
    return micro_model(text=TOWER)


def text(prompt, dialect):
    (read,) = parse(prompt, dialect).texts(1)
    return read


def states(model, prompt, dialect="none", skip=0):
    return encode_prompts(model, [text(prompt, dialect)], clip_skip=skip)[0].tokens


# -- compel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "skip"), [("last", 0), ("penultimate", 1)])
def test_compel_gave_these_numbers(model, layer, skip):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[layer]
    assert list(golden) == PROMPTS
    for prompt, expected in golden.items():
        ours = digest(states(model, prompt, "compel", skip=skip))
        assert ours == pytest.approx(expected, abs=2e-5), prompt
        other = digest(states(model, prompt, "compel", skip=1 - skip))
        assert other != pytest.approx(expected, abs=1e-2), prompt


def test_a_tower_without_its_last_layer_is_read_at_the_end(model):
    """SD 2's folders: 23 layers of OpenCLIP's 24, whose end is the whole tower's penultimate."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["penultimate"]
    short = SPEC.replace(layers=SPEC.layers - 1)
    tower = TextTower(short).eval()
    kept = {k: v for k, v in TOWER.state_dict().items() if k in tower.state_dict()}
    tower.load_state_dict(kept)
    cut = micro_model(model.spec.replace(text=short), text=tower)
    for prompt, expected in golden.items():
        assert digest(states(cut, prompt, "compel")) == pytest.approx(expected, abs=2e-5), prompt


@pytest.mark.parametrize("fault", ["mask", "tan", "empty", "lerp"])
def test_golden_numbers_notice_a_fault(model, monkeypatch, fault):
    import math

    from safelight.conditioning import text as module

    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["last"]
    prompt = "(a (blue sphere)0.3)0.5 beside- a cone"
    if fault == "mask":
        tower_ = module._Encoder._tower
        monkeypatch.setattr(
            module._Encoder, "_tower", lambda self, chunks, seen=None: tower_(self, chunks)
        )
    elif fault == "tan":
        monkeypatch.setattr(math, "tan", lambda x: x)
    elif fault == "empty":
        monkeypatch.setattr(module, "_EMPTY", Text.of(("cube", 1.0)))
    else:
        prompt = '("a red cube", "a blue sphere").and(1, 0.4)'
        read = text(prompt, "compel")
        read = Text(tuple(Clause(c.blend) for c in read.clauses), "compel")
        ours = digest(encode_prompts(model, [read])[0].tokens)
        assert ours != pytest.approx(golden[prompt], abs=1e-3)
        return
    assert digest(states(model, prompt, "compel")) != pytest.approx(golden[prompt], abs=1e-3)


def test_compel_itself(model):
    pytest.importorskip("compel", reason="no compel package to compare with")
    for penultimate in LAYERS.values():
        for prompt, theirs in zip(
            PROMPTS, compel_states(PROMPTS, penultimate=penultimate), strict=True
        ):
            ours = states(model, prompt, "compel", skip=int(penultimate))
            assert ours.shape == theirs.shape, prompt
            assert torch.allclose(ours, theirs, atol=1e-5), prompt


def test_compel_is_the_plain_encoding_where_nothing_weighs(model):
    assert torch.equal(states(model, "a (red) cube", "compel"), states(model, "a red cube"))


def test_unseen_words_against_transformers(model):
    reference, ours = tower(), TOWER
    ids = torch.tensor([model.tokenizer.tokens(["a red cube on top of a sphere"])[0]] * 2)
    seen = torch.ones_like(ids).bool()
    seen[0, 2:4] = False
    with torch.no_grad():
        theirs = reference(ids, attention_mask=seen.long()).last_hidden_state
        assert torch.allclose(ours(ids, seen=seen).states, theirs, atol=2e-6)
        assert torch.allclose(ours(ids).states[1], theirs[1], atol=2e-6)
    assert not torch.allclose(theirs[0], theirs[1], atol=1e-3)


# -- A1111 ----------------------------------------------------------------------------------------


def test_a1111_multiplies_and_restores_the_mean(model):
    plain = states(model, "a red cube")
    weighted = plain.clone()
    start = 1 + model.tokenizer.count("a")
    weighted[start : start + model.tokenizer.count("red")] *= 1.5
    expected = weighted * (plain.mean() / weighted.mean())
    assert torch.allclose(states(model, "a (red:1.5) cube", "a1111"), expected, atol=1e-5)
    assert torch.equal(states(model, "a red cube", "a1111"), plain)


def test_break_begins_a_window(model):
    both = states(model, "a red cube BREAK a blue sphere", "a1111")
    apart = [states(model, words) for words in ("a red cube", "a blue sphere")]
    assert torch.allclose(both, torch.cat(apart), atol=1e-6)


# -- all dialects ---------------------------------------------------------------------------------


def test_long_prompts_are_padded_with_the_empty_prompt(model):
    long = "a red cube on top of a blue sphere, " * 3
    short, longer = encode_prompts(model, ["a cube", long])
    assert len(short.tokens) == len(longer.tokens) >= 2 * L
    assert torch.equal(short.tokens[L : 2 * L], states(model, ""))


def test_windows_are_the_dialects_own(model):
    prompt = "a red cube. a blue sphere, a small green cone. a large ball, a cube on top of a cone"
    for dialect in DIALECTS:
        windows = text_windows(model.tokenizer, text(prompt, dialect))
        assert len(states(model, prompt, dialect)) == L * len(windows)
        content = [
            i for w in windows for i, s in zip(w.ids, w.sources, strict=True) if s >= 0
        ]  # fmt: skip
        assert content == model.tokenizer.encode(prompt), "nothing is cut"
    full = [w.sources.count(0) for w in text_windows(model.tokenizer, text(prompt, "none"))]
    assert full[:-1] == [L - 2] * (len(full) - 1)


def test_a_text_is_encoded_once(model, monkeypatch):
    model.text_cache = Cache()
    calls = []
    forward = TextTower.forward
    monkeypatch.setattr(
        TextTower,
        "forward",
        lambda self, ids, **k: calls.append(len(ids)) or forward(self, ids, **k),
    )
    long = "a red cube on top of a blue sphere, " * 3
    one = encode_prompts(model, ["a cube", "a cone", long])
    done = len(calls)
    assert done == 4, "each text, and the empty one to pad with"
    two = encode_prompts(model, ["a cone", "a cube", long])
    assert len(calls) == done
    assert one[0].tokens is two[1].tokens, "padded ones too"


def test_clip_skip_is_diffusers_count(model):
    reference = tower()
    ids = torch.tensor([model.tokenizer.tokens(["a red cube"])[0]])
    with torch.no_grad():
        hidden = reference(ids, output_hidden_states=True).hidden_states
        norm = getattr(reference, "text_model", reference).final_layer_norm
        # A1111's 2 is hidden_states[-2]; diffusers' clip_skip 1 is hidden_states[-(1 + 1)].
        assert torch.allclose(states(model, "a red cube", skip=1), norm(hidden[-2])[0], atol=2e-6)
    with pytest.raises(InvalidRequest, match="clip_skip"):
        states(model, "a", skip=2)


WORDS = st.lists(st.sampled_from(["a", "red", "cube", "it-is", "12", "é", "sphere!"]), max_size=4)


@settings(max_examples=25)
@given(words=WORDS)
def test_text_without_syntax_is_the_same_in_all_dialects(words):
    model, prompt = micro_model(text=TOWER), " ".join(words)
    assume(model.tokenizer.count(prompt) <= L - 2)  # windows end where the dialect ends them
    one, two, three = (states(model, prompt, dialect) for dialect in DIALECTS)
    assert torch.equal(one, two)
    assert torch.equal(one, three)


@settings(max_examples=40)
@given(
    prompt=st.text(alphabet='ab ,()[]:+-."\\1|<>', max_size=24), dialect=st.sampled_from(DIALECTS)
)
def test_whatever_parses_encodes(prompt, dialect):
    model = micro_model(text=TOWER)
    try:
        texts = [t for part in parse(prompt, dialect).parts for t in part.texts(3)]
    except InvalidRequest:
        return
    for each in encode_prompts(model, texts):
        assert len(each.tokens) % L == 0
        assert each.tokens.isfinite().all()
