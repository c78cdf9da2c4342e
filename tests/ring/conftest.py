"""A small ring, both of its ends in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from moeshm import RingConsumer, RingProducer
from tests.ring import rings


@pytest.fixture
def ring() -> Iterator[tuple[RingProducer, RingConsumer]]:
    """Producer and consumer of one page; they sleep at once."""
    with rings.pair() as ends:
        yield ends


@pytest.fixture
def name() -> Iterator[str]:
    """A name for a segment."""
    with rings.unique_name() as unique:
        yield unique


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A new seed, printed: pytest shows it when the test fails."""
    number = int.from_bytes(os.urandom(4), "little")
    print(f"{request.node.name}: seed {number}")
    return number
