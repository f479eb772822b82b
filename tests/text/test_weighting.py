"""Prompt dialects, by the examples that their users know."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.errors import InvalidRequest
from safelight.text.weighting import parse


def rounded(fragments):
    return [(text, round(weight, 6)) for text, weight in fragments]


def test_none_is_text():
    assert parse("a (red:1.3) cube++") == [("a (red:1.3) cube++", 1.0)]


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
        ("[x:1.3]", [("x:1.3", 0.909091)]),
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
    assert rounded(parse(prompt, "a1111")) == rounded(expected)


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
        expected = [("hairy", 1), ("mountain, man with a", 1.1), ("beard", 1.21)]
    assert rounded(parse(prompt, "compel")) == rounded(expected)


@pytest.mark.parametrize("prompt", ['("a", "b").blend(0.7, 0.3)', "cat.swap(dog)"])
def test_compel_operators_that_are_not_weights_say_so(prompt):
    with pytest.raises(InvalidRequest, match=r"prompt: .*not supported"):
        parse(prompt, "compel")


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


@given(prompt=st.text(alphabet='ab ,()[]:+-."\\1', max_size=40))
def test_any_prompt_parses(prompt):
    for dialect in ("a1111", "compel"):
        fragments = parse(prompt, dialect)
        assert fragments
        assert {c for t, _ in fragments for c in t} <= set(prompt) | {" "}
