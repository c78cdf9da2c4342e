"""The demo's parts that need no worker: text from single bytes, and the comparison of two runs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moeshm.demo.run import Step, compare
from moeshm.demo.text import TextStream


def text_of(data: bytes) -> str:
    """As a terminal gets it, byte by byte."""
    stream = TextStream()
    return "".join(stream.feed(bytes([byte])) for byte in data) + stream.end()


def steps(*values: tuple[int, float]) -> list[Step]:
    """Tokens, and logits that are all of one value."""
    return [(token, np.full(4, value, np.float32)) for token, value in values]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"def f():\n\treturn 1\n", "def f():\n\treturn 1\n"),
        ("é€😀".encode(), "é€😀"),
        (b"a\xffb\xc3(", "a�b�("),
        (b"a\xe2\x82", "a�"),
        (b"\x00\x1b[2J\r\x7f", "␀␛[2J␍␡"),
        ("\x9b31m".encode(), "�31m"),
    ],
)
def test_any_bytes_are_text_that_leaves_a_terminal_alone(data: bytes, expected: str) -> None:
    assert text_of(data) == expected


def test_a_character_comes_when_its_last_byte_does() -> None:
    stream = TextStream()
    assert [stream.feed(bytes([byte])) for byte in "€".encode()] == ["", "", "€"]
    assert stream.end() == ""


def test_the_largest_difference_of_any_step_and_logit_counts() -> None:
    expected = steps((1, 0.0), (2, 0.0), (3, 0.0))
    found = steps((1, 0.0), (2, 0.0), (3, 0.0))
    found[1][1][2] = -0.5
    assert compare(found, expected) == (0.5, None)


def test_runs_are_compared_until_their_texts_part() -> None:
    expected = steps((1, 0.0), (2, 0.0), (3, 0.0))
    assert compare(steps((1, 0.0), (7, 0.25), (3, 9.0)), expected) == (0.25, 1)


def test_a_logit_that_is_no_number_is_no_agreement() -> None:
    difference, _ = compare(steps((1, 0.0), (2, math.nan)), steps((1, 0.0), (2, 0.0)))
    assert math.isnan(difference)
