"""Prompt dialects, by the examples that their users know."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.errors import InvalidRequest
from safelight.text.weighting import DIALECTS, extract_loras, parse


def rounded(fragments):
    return [(text, round(weight, 6)) for text, weight in fragments]


def fragments(prompt, dialect="none"):
    """Of a prompt that says one thing for the whole run."""
    (text,) = parse(prompt, dialect).texts(4)
    return list(text.fragments)


def schedule(prompt, steps=10):
    """What is read at each step; equal neighbours once, with the number of their last step."""
    (part,) = parse(prompt, "a1111").parts
    out = []
    for step, text in enumerate(part.texts(steps), start=1):
        words = "".join(f"({t}:{w:g})" if w != 1 else t for t, w in text.fragments)
        if out and out[-1][1] == words:
            out.pop()
        out.append((step, words))
    return out


def test_none_is_text():
    assert fragments("a (red:1.3) cube++") == [("a (red:1.3) cube++", 1.0)]
    assert fragments("[a|b] <lora:x:1> AND") == [("[a|b] <lora:x:1> AND", 1.0)]


@pytest.mark.parametrize(
    ("dialect", "prompt", "words"),
    [
        ("none", "a (red:1.2)  cube", "a (red:1.2) cube"),
        ("a1111", "a (red:1.2) cube, [dark]", "a red cube, dark"),
        ("a1111", r"a \(red\) [cow|horse] [young:old:0.5] <lora:x:1>", "a (red) cow young"),
        ("a1111", "a cat AND a dog :-0.5 AND a bird :0.4", "a cat a bird"),
        ("compel", "a red++ cube (on top)0.5 of", "a red cube on top of"),
        ("compel", '("a cat", "a dog").blend(1, -0.5)', "a cat"),
        ("compel", '("a cat", "a (dog)0").and()', "a cat a"),
    ],
)
def test_a_prompt_without_its_weights(dialect, prompt, words):
    assert parse(prompt, dialect).words(4) == words


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [("", 1)]),
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("[a", [("a", 0.909091)]),
        (r"\(literal\]", [("(literal]", 1)]),
        (r"back\slash \\", [("back\\slash \\", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("a [less] b", [("a ", 1), ("less", 0.909091), (" b", 1)]),
        ("(a:0.5)", [("a", 0.5)]),
        ("(a :  1.5 )", [("a ", 1.5)]),
        ("(a:-1)", [("a", -1)]),
        ("((a:2) b)", [("a", 2.2), (" b", 1.1)]),
        (r"[x\:1.3]", [("x:1.3", 0.909091)]),
        (r"a\|b \<lora:x:1>", [("a|b <lora:x:1>", 1)]),
        ("salt and pepper", [("salt and pepper", 1)]),
        ("at 12:30", [("at 12:30", 1)]),
        ("time 12:30)", [("time 12:30)", 1)]),
        ("a) b]", [("a) b]", 1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
    ],
)
def test_a1111(prompt, expected):
    assert rounded(fragments(prompt, "a1111")) == rounded(expected)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        # The web UI's own examples, for 10 steps.
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a (b:0.826446)")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("((a][:b:c [d:3]", [(3, "(a]:1.21)(:b:c :1.1)"), (10, "(a]:1.21)(:b:c d:1.1)")]),
        ("[a|b]", [(k, "ab"[(k - 1) % 2]) for k in range(1, 11)]),
        # Ours.
        ("[a::4]b", [(4, "ab"), (10, "b")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:-1]", [(10, "b")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:1]", [(1, "a"), (10, "b")]),
        ("[a:b:99]", [(10, "a")]),
        ("([a:b:0.5]:1.5)", [(5, "(a:1.5)"), (10, "(b:1.5)")]),
        ("[a:(b:1.2):0.5]", [(5, "a"), (10, "(b:1.2)")]),
        (r"[a\:b:c:5]", [(5, "a:b"), (10, "c")]),
        ("[[a|b]:c:2]", [(1, "a"), (2, "b"), (10, "c")]),
        ("[a <lora:x:1>:5]", [(5, ""), (10, "a ")]),
        ("[a:b:c:5]", [(10, "(a:b:c:5:0.909091)")]),
        ("[a:b]", [(10, "(a:b:0.909091)")]),
    ],
)
def test_a1111_changes_during_the_run(prompt, expected):
    assert schedule(prompt) == expected


def test_a1111_alternates_with_nothing_too():
    assert [words for _, words in schedule("[a||b]x", 4)] == ["ax", "x", "bx", "ax"]


def test_a1111_shares_are_not_lost_to_rounding():
    assert schedule("[a:b:0.29]", 100)[0][0] == 29
    assert schedule("[a:b:0.5]", 5)[0][0] == 2, "as the web UI rounds"


def test_a1111_joins_prompts():
    read = parse("a cat :1.2 AND a [dog:fox:2]: -0.5 AND x:y", "a1111")
    assert [part.weight for part in read.parts] == [1.2, -0.5, 1.0]
    words = [[t.fragments[0][0] for t in part.texts(3)] for part in read.parts]
    assert [[w.strip() for w in row] for row in words] == [
        ["a cat"] * 3,
        ["a dog", "a dog", "a fox"],
        ["x:y"] * 3,
    ]
    assert len(parse("a AND b", "a1111", "negative_prompt").parts) == 1, "text, as in the web UI"


def test_a1111_breaks_windows():
    (text,) = parse("a (red BREAK blue) b BREAK", "a1111").texts(1)
    clauses = [rounded(clause.blend[0][0]) for clause in text.clauses]
    assert clauses == [[("a ", 1), ("red", 1.1)], [("blue", 1.1), (" b", 1)]]


def test_loras_are_taken_out():
    read = "a <lora:x:0.8>red [<lora:y z>:cube:3]<lyco:w:-1>"
    expected = (("x", 0.8), ("y z", 1.0), ("w", -1.0))
    assert extract_loras(read, "a1111") == ("a red [:cube:3]", expected)
    assert extract_loras("a withLora(x-1, 0.5) cube", "compel") == ("a  cube", (("x-1", 0.5),))
    assert extract_loras("a <lora:x:1>") == ("a <lora:x:1>", ())
    with pytest.raises(InvalidRequest, match="negative_prompt"):
        parse("a <lora:x:1>", "a1111", "negative_prompt")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [("", 1)]),
        ("fire flames", [("fire flames", 1)]),
        ("fire (flames)", [("fire flames", 1)]),
        ("hamburger ((kaiser roll))", [("hamburger kaiser roll", 1)]),
        ("fire, flames , fire", [("fire, flames , fire", 1)]),
        ("cat hot-dog eating", [("cat hot-dog eating", 1)]),
        ("a badly formed +test prompt", [("a badly formed +test prompt", 1)]),
        ("a badly (formed +test prompt", [("a badly (formed +test prompt", 1)]),
        ("a - b -- c", [("a - b -- c", 1)]),
        ("(flames)0.5", [("flames", 0.5)]),
        ("flames.attend(0.5)", [("flames", 0.5)]),
        ("flames.attend(+)", [("flames", 1.1)]),
        ('"flames"+', [("flames", 1.1)]),
        ("(flames)--", [("flames", 0.81)]),
        ("word1.3", [("word1.3", 1)]),
        ("flowers fire++ flames", [("flowers", 1), ("fire", 1.21), ("flames", 1)]),
        ("(flowers)--- flames+++", [("flowers", 0.729), ("flames", 1.331)]),
        ("(pretty flowers)+, hot", [("pretty flowers", 1.1), (", hot", 1)]),
        ("a,red+ cube", [("a,", 1), ("red", 1.1), ("cube", 1)]),
        ("rock-n-roll+", [("rock-n-roll", 1.1)]),
        ("fire (flames (trees)1.5)2.0", [("fire", 1), ("flames", 2), ("trees", 3)]),
        (r"mountain \(man\)", [("mountain (man)", 1)]),
        (r"mountain (\(man\))+", [("mountain", 1), ("(man)", 1.1)]),
        (r"h\(o\)t+", [("h(o)t", 1.1)]),
        ('hairy ("mountain, man" with a beard+)+', None),
    ],
)
def test_compel(prompt, expected):
    if expected is None:
        expected = [("hairy", 1), ("mountain , man with a", 1.1), ("beard", 1.21)]
    assert rounded(fragments(prompt, "compel")) == rounded(expected)


@pytest.mark.parametrize(
    ("prompt", "clauses"),
    [
        ('("a", "b").blend(0.75, 0.25)', [([("a", 0.75), ("b", 0.25)], 1)]),
        ('("a", "b").blend()', [([("a", 0.5), ("b", 0.5)], 1)]),
        ('("a", b).blend(2, -1, no_normalize)', [([("a", 2), ("b", -1)], 1)]),
        ('("a", "b").and()', [([("a", 1)], 1), ([("b", 1)], 1)]),
        ('("a", (b)).add(1, 0.5) ', [([("a", 1)], 1), ([("b", 1)], 0.5)]),
        ('("a=(", "b").and()', [([("a=(", 1)], 1), ([("b", 1)], 1)]),
    ],
)
def test_compel_joins_and_mixes(prompt, clauses):
    (text,) = parse(prompt, "compel").texts(1)
    found = [([(f[0][0], s) for f, s in c.blend], c.weight) for c in text.clauses]
    assert found == clauses


@pytest.mark.parametrize(
    ("prompt", "dialect", "place"),
    [
        ("cat.swap(dog)", "compel", 4),
        ('("a", "b").blend(1, 1) more', "compel", 24),
        ('x ("a", "b").and()', "compel", 13),
        ('("a", "b").and(1)', "compel", 11),
        ('("a", "b").blend(1, -1)', "compel", 11),
        ('("a", "b").blend(x, 1)', "compel", 18),
        ("a,b (c)5000", "compel", 8),
        ("a red (cube:5000) c", "a1111", 12),
        ("a <lora:x:1>red (cube:5000)", "a1111", 22),
        ("a [b|c:3]", "a1111", 3),
        ("a AND ", "a1111", 6),
        ("(salt AND pepper)", "a1111", 7),
        ("a <lora:x:y:z>", "a1111", 3),
        ("a <hypernet:x:1>", "a1111", 3),
        (" AND ".join("abcdefghijklmnopqrs"), "a1111", None),
    ],
)
def test_mistakes_are_found_with_their_place(prompt, dialect, place):
    where = "at character" if place is None else f"at character {place},"
    with pytest.raises(InvalidRequest, match=f"prompt: {where}"):
        parse(prompt, dialect)


@pytest.mark.parametrize(
    ("prompt", "dialect"),
    [
        ("a", "webui"),
        ("(" * 70 + "a" + ")" * 70, "compel"),
        ("(a:" + "9" * 400 + ")", "a1111"),
        ("(a)" + "9" * 400, "compel"),
        ("a" + "+" * 20000, "compel"),
    ],
)
def test_absurd_input_is_an_error(prompt, dialect):
    with pytest.raises(InvalidRequest):
        parse(prompt, dialect)


ATOMS = [*'ab ,()[]:+-."\\1|<>', "AND", "BREAK", "<lora:", ".and(", ".blend(", ".attend(", "0.5]"]


@given(atoms=st.lists(st.sampled_from(ATOMS), max_size=30), steps=st.integers(1, 4))
def test_any_prompt_parses_or_says_why_not(atoms, steps):
    prompt = "".join(atoms)
    for dialect in DIALECTS:
        try:
            texts = parse(prompt, dialect).texts(steps)
        except InvalidRequest as error:
            texts, said = (), str(error)
        else:
            said = "at character"
        assert "at character" in said
        for text in texts:
            assert text.fragments
            assert {c for t, _ in text.fragments for c in t} <= set(prompt) | {" "}


@given(prompt=st.text(max_size=60))
def test_any_text_parses_or_says_why_not(prompt):
    for dialect in DIALECTS:
        with suppress(InvalidRequest):
            assert parse(prompt, dialect).texts(3)


@given(words=st.lists(st.sampled_from(["a", "red", "hot-dog", "12:30", "it's", "é!"]), max_size=8))
def test_text_without_syntax_is_text_in_every_dialect(words):
    prompt = " ".join(words)
    assert all(fragments(prompt, dialect) == [(prompt, 1.0)] for dialect in DIALECTS)


@pytest.mark.parametrize("dialect", ["a1111", "compel"])
@pytest.mark.parametrize(
    "unit", ["(", "((a)", "[a:", "a+ ", '"', " ", "[a|b]", "a, ", "(a)- ", ":"]
)
def test_long_prompts_are_read_in_no_time(unit, dialect):
    began = time.process_time()
    with suppress(InvalidRequest):
        parse((unit * 20_000)[:20_000], dialect).texts(20)
    assert time.process_time() - began < 5
