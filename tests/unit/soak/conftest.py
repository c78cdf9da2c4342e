"""The books of a calling process, and what they tell."""

from __future__ import annotations

import pytest

from moeshm.soak.books import Books
from moeshm.soak.messages import Message
from tests.unit.soak.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def told() -> list[Message]:
    return []


@pytest.fixture
def books(told: list[Message], clock: Clock) -> Books:
    return Books(told.append, clock=clock)
