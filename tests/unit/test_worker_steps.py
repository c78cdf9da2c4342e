"""A worker's call that is ended between two steps leaves nothing behind."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moeshm.dtypes import FloatArray
from moeshm.errors import DeadlineExceeded, MoeshmError, PeerDied
from moeshm.holdings import Holdings
from moeshm.turns import MANY_TOKENS, Turns
from moeshm.views import SessionViews
from moeshm.worker import SessionServer, _BetweenSteps
from tests.crash.arithmetic import FREE, ArithmeticBackend


def compute(array: FloatArray, between_steps: _BetweenSteps) -> None:
    """A step, after which somebody waits or the call is of no more use; its frame has the array."""
    array[...] = 0
    time.sleep(0)
    between_steps()


def make_server(turns: Turns, is_gone: bool) -> SessionServer:
    """Of a session whose client is gone, or not."""
    session: Any = SimpleNamespace(
        transport=None,
        welcome=SimpleNamespace(max_tokens=64),
        peer_is_gone=lambda: is_gone,
        control=SimpleNamespace(peer_pid=1),
    )
    views = SessionViews(Holdings(ArithmeticBackend()))
    return SessionServer(session, views, turns, threading.Event())


@pytest.mark.parametrize(
    ("is_gone", "error", "words"),
    [(True, PeerDied, "is gone"), (False, DeadlineExceeded, "between two steps of the call")],
)
def test_a_call_that_ends_between_steps_keeps_no_array(
    is_gone: bool, error: type[MoeshmError], words: str
) -> None:
    """Nor the turn: its record could not be released."""
    turns = Turns()
    server = make_server(turns, is_gone)
    steps = server._between_steps
    array = np.ones(3, np.float32)
    gone = weakref.ref(array)

    def step(array: FloatArray, between_steps: _BetweenSteps) -> None:
        # The deadline passes while it computes.
        between_steps._deadline_ns = 1
        compute(array, between_steps)

    gc.disable()
    try:
        with pytest.raises(error, match=words) as caught:
            server._in_turn(0, MANY_TOKENS + 1, FREE, step, array, steps)
        del caught, array
        assert gone() is None
    finally:
        gc.enable()
    assert not turns._taken.locked()


def test_the_pauses_of_a_call_are_not_the_next_ones() -> None:
    """Though that ends before it begins."""
    turns = Turns()
    server = make_server(turns, is_gone=False)

    def paused(between_steps: _BetweenSteps) -> None:
        between_steps.paused_ns += 10**15

    server._in_turn(0, MANY_TOKENS + 1, FREE, paused, server._between_steps)
    with pytest.raises(DeadlineExceeded, match="before the call's turn came"):
        server._in_turn(1, 1, FREE, paused, server._between_steps)
    assert server._compute_ns >= 0
    assert not turns._taken.locked()
