"""Where long prompts are cut, on tokens written out."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.text.windows import BACKTRACK, lengths


def spelled(text: str) -> list[str]:
    """Each word a token; one that ends in "-" goes on."""
    return [w.removesuffix("-") if w.endswith("-") else f"{w}</w>" for w in text.split()]


@pytest.mark.parametrize(
    ("text", "manner", "expected"),
    [
        ("", "hard", [0]),
        ("a b c d", "hard", [4]),
        ("a b c d e f", "hard", [5, 1]),
        ("a , b . c d e", "hard", [5, 2]),
        ("a , b . c d e", "sentence", [4, 3]),
        ("a , b c d e", "sentence", [2, 4]),
        ("a b c d- e- f g", "sentence", [3, 4]),
        ("a- b- c- d- e- f", "sentence", [5, 1]),
        ("a . b . c d . e f g h i", "sentence", [4, 3, 5]),
        ("a , b c d e", "comma", [2, 4]),
        ("a b c d , e", "comma", [5, 1]),
        ("a , b c d , e", "comma", [5, 2]),
        ("a b c d e f", "comma", [5, 1]),
    ],
)
def test_windows_of_five(text, manner, expected):
    assert lengths(spelled(text), 5, manner) == expected


def test_a_comma_far_from_the_end_does_not_count():
    for place in range(75):
        tokens = ["a</w>"] * 80
        tokens[place] = ",</w>"
        near = 75 - place <= BACKTRACK
        assert lengths(tokens, 75, "comma")[0] == (place + 1 if near else 75)


@given(
    tokens=st.lists(st.sampled_from(["a</w>", "b", ",</w>", ".</w>", ";</w>"]), max_size=40),
    room=st.integers(1, 9),
    manner=st.sampled_from(["hard", "comma", "sentence"]),
)
def test_nothing_is_lost_and_every_window_has_something(tokens, room, manner):
    found = lengths(tokens, room, manner)
    assert list(accumulate(found))[-1] == len(tokens)
    assert all(0 < n <= room for n in found[:-1])
    assert found[-1] <= room
