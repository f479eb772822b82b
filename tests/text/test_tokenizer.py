"""The tokenizer against transformers' CLIPTokenizer, with vocabularies made here."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from safelight.errors import WeightsError
from safelight.text.tokenizer import Tokenizer, byte_symbols, learn_vocabulary

SHAPES = ["cube", "sphere", "cone", "torus", "cylinder"]
COLOURS = ["red", "green", "blue", "yellow", "purple"]
CAPTIONS = [
    f"a {a} {b} {relation} a {c} {d}"
    for a in COLOURS
    for b in SHAPES
    for c in COLOURS
    for d in SHAPES
    for relation in ("on top of", "to the left of", "in front of")
] + ["it's the artist's naïve café, 1984!", "l'été à 12:30 — 中文 and emoji 🎨"]
TABLES = learn_vocabulary(CAPTIONS, 200)


@pytest.fixture(scope="module", params=["v1", "v2"])
def pair(request, tmp_path_factory):
    """Ours and transformers', from the folder that ours wrote; padding of SD 1 and of SD 2."""
    pad_id = {"v1": None, "v2": 0}[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    ours = Tokenizer.from_vocab(*TABLES, context_length=20, pad_id=pad_id)
    ours.save(folder)
    return Tokenizer.from_folder(folder), CLIPTokenizer.from_pretrained(folder)


def theirs(tokenizer: CLIPTokenizer, text: str, length: int = 20) -> list[int]:
    padded = tokenizer(text, padding="max_length", max_length=length, truncation=True)
    return padded.input_ids


def random_text(rng: random.Random) -> str:
    alphabet = (
        "abcdeXYZ éÉßİı'’!?.,;:<|>#-_()[]0123456789\t\n\u00a0\u3000中文한국🎨e\u0301\x00\u200b"
    )
    words = ["red", "Cube", "IT'S", "<|endoftext|>", "<|startoftext|>", "</w>", "ll", "'ll", "!!"]
    pieces = []
    for _ in range(rng.randrange(8)):
        if rng.random() < 0.5:
            pieces.append(rng.choice(words))
        else:
            pieces.append("".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 6))))
    return rng.choice(["", " "]).join(pieces)


def test_equals_transformers_on_a_fuzzed_corpus(pair):
    ours, reference = pair
    rng = random.Random(0)
    for text in [*CAPTIONS[:50], *CAPTIONS[-2:], "", " ", *(random_text(rng) for _ in range(3000))]:
        assert ours.tokens([text])[0] == theirs(reference, text), repr(text)


@given(text=st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_equals_transformers_on_any_text(pair, text):
    ours, reference = pair
    assert ours.tokens([text])[0] == theirs(reference, text)


def test_decode_equals_transformers(pair):
    ours, reference = pair
    for text in CAPTIONS[::40]:
        ids = ours.tokens([text])[0]
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert ours.decode(ours.encode("A red   CUBE")) == "a red cube"


def test_reads_what_transformers_writes(pair, tmp_path):
    ours, reference = pair
    reference.save_pretrained(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.tokens([*CAPTIONS[::50], "wow! red"]) == ours.tokens([*CAPTIONS[::50], "wow! red"])
    assert (again.context_length, again.pad_id) == (20, ours.pad_id)


def test_padding_conventions():
    v1 = Tokenizer.from_vocab(*TABLES)
    v2 = Tokenizer.from_vocab(*TABLES, pad_id=0)
    (first,), (second,) = v1.tokens(["red"]), v2.tokens(["red"])
    assert len(first) == len(second) == 77
    assert first[:3] == second[:3] == [v1.bos_id, *v1.encode("red"), v1.eos_id]
    assert set(first[3:]) == {v1.eos_id}
    assert set(second[3:]) == {0}
    assert v1.vocab["!"] == 0


def test_padding_can_be_overridden(tmp_path):
    Tokenizer.from_vocab(*TABLES).save(tmp_path)
    assert Tokenizer.from_folder(tmp_path, pad_id=0).tokens(["red"])[0][-1] == 0
    with pytest.raises(WeightsError, match="pad_id = 99999"):
        Tokenizer.from_folder(tmp_path, pad_id=99999)


def test_long_prompts_are_chunked_and_never_cut(caplog):
    tokenizer = Tokenizer.from_vocab(*TABLES, context_length=12)
    text = " ".join(CAPTIONS[:5])
    ids = tokenizer.encode(text)
    chunks = tokenizer.chunks(text)
    assert len(chunks) == -(-len(ids) // 10) > 2
    assert all(len(c) == 12 and c[0] == tokenizer.bos_id for c in chunks)
    content = [i for c in chunks for i in c[1 : c.index(tokenizer.eos_id)]]
    assert content == ids
    assert tokenizer.chunks("") == tokenizer.tokens([""])
    assert not caplog.records
    tokenizer.tokens([text])
    assert f"{len(ids)} tokens cut to 10" in caplog.text
    assert "red" not in caplog.text, "prompts are not logged"


def test_weighted_chunks_carry_one_weight_a_token():
    tokenizer = Tokenizer.from_vocab(*TABLES, context_length=8)
    chunks = tokenizer.weighted_chunks([("red ", 1.0), ("cube", 1.5), (" on top of", 0.5)])
    assert [c.ids for c in chunks] == tokenizer.chunks("red cube on top of")
    assert chunks[0].weights == [1, 1, 1.5, 0.5, 0.5, 0.5, 1, 1]


def test_learned_vocabulary_is_in_clips_order():
    vocab, merges = TABLES
    tokens = list(vocab)
    assert tokens[:256] == byte_symbols()
    assert tokens[256:512] == [s + "</w>" for s in byte_symbols()]
    assert tokens[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert list(vocab.values()) == list(range(len(vocab)))
    assert {a + b for a, b in merges} == set(tokens[512:-2])
    tokenizer = Tokenizer.from_vocab(vocab, merges)
    assert all(tokenizer.count(word) == 1 for word in SHAPES + COLOURS)
    assert tokenizer.vocab_size == len(vocab)


def test_learning_ignores_the_order_of_captions():
    shuffled = random.Random(1).sample(CAPTIONS, len(CAPTIONS))
    assert learn_vocabulary(shuffled, 100) == learn_vocabulary(CAPTIONS, 100)


def test_learning_ends_when_every_word_is_one_token():
    vocab, merges = learn_vocabulary(["red red", "rad"], 1000)
    assert Tokenizer.from_vocab(vocab, merges).count("red rad") == 2
    assert len(merges) <= 4


def test_added_tokens_survive_the_folder(tmp_path):
    tokenizer = Tokenizer.from_vocab(*TABLES)
    tokenizer.save(tmp_path)
    new = {"<sks>": len(TABLES[0])}
    (tmp_path / "added_tokens.json").write_text(json.dumps(new))
    again = Tokenizer.from_folder(tmp_path)
    assert again.encode("a <sks> cube")[1] == new["<sks>"]
    again.save(tmp_path / "copy")
    assert Tokenizer.from_folder(tmp_path / "copy").encode("<sks>") == [new["<sks>"]]


def test_lone_surrogates_do_not_raise():
    assert Tokenizer.from_vocab(*TABLES).encode("red \ud800 cube")


@pytest.mark.parametrize("fault", ["no folder", "no merges", "not json", "other tokenizer", "ids"])
def test_faults_name_the_file(tmp_path, fault):
    Tokenizer.from_vocab(*TABLES).save(tmp_path)
    folder = tmp_path
    if fault == "no folder":
        folder = tmp_path / "absent"
    elif fault == "no merges":
        (tmp_path / "merges.txt").unlink()
    elif fault == "not json":
        (tmp_path / "vocab.json").write_text('{"a": ')
    elif fault == "other tokenizer":
        (tmp_path / "vocab.json").write_text('{"[CLS]": 0}')
    else:
        (tmp_path / "added_tokens.json").write_text('{"<sks>": 7000}')
    with pytest.raises(WeightsError, match=str(tmp_path)):
        Tokenizer.from_folder(folder)
