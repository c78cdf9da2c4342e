"""A target that breaks: a fuzzer that does not find it finds nothing."""

from __future__ import annotations


def close() -> None:
    """Nothing is kept between executions."""


def seeds() -> list[bytes]:
    """Data to begin with."""
    return [b"\0"]


def test_one(data: bytes) -> str:
    """AssertionError for data that begins with a seven."""
    assert data[:1] != b"\7", "seven is too much"
    return "fine"
