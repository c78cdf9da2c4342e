"""Calls with little time behind calls of the same session with more: they end alone."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import moeshm
from moeshm.errors import DeadlineExceeded, WorkerDied
from tests.crash.arithmetic import (
    FREE,
    GATED,
    WIDE,
    ArithmeticBackend,
    assert_exact,
    make_inputs,
)
from tests.crash.processes import PATIENCE_S, GatedWorker, within

SOON_S = 15.0
SHORT_S = 0.1


def assert_goes_on(client: moeshm.ExpertClient) -> None:
    """By the session that it has had from the beginning."""
    inputs = make_inputs(FREE, 9)
    assert_exact(client.compute(*inputs), inputs)
    assert client.stats().reconnects == 0


@pytest.mark.parametrize("how", ["submit", "compute", "cut"])
def test_a_late_call_behind_one_with_more_time_ends_alone(
    worker: GatedWorker, client: moeshm.ExpertClient, how: str
) -> None:
    first = client.submit(*make_inputs(GATED, 1))
    worker.next_turn()
    late = make_inputs(FREE, 2, n_tokens=6)
    calls = {
        "compute": lambda: client.compute(*late, timeout_s=SHORT_S),
        "submit": lambda: client.submit(*late, timeout_s=SHORT_S).result(),
        "cut": lambda: client.submit(*late, timeout_s=SHORT_S, slice_tokens=2).result(),
    }
    with within(SOON_S), pytest.raises(DeadlineExceeded, match="earlier calls of this client"):
        calls[how]()
    worker.let_go()
    assert_exact(first.result(), make_inputs(GATED, 1))
    # The worker's own words about the late one are nobody's.
    assert_goes_on(client)


def test_a_late_call_behind_one_that_another_thread_computes_ends_alone(
    worker: GatedWorker, client: moeshm.ExpertClient
) -> None:
    """Who receives there knows its own call without a future."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(client.compute(*make_inputs(GATED, 1))))
    thread.start()
    worker.next_turn()
    with within(SOON_S), pytest.raises(DeadlineExceeded, match="earlier calls of this client"):
        client.compute(*make_inputs(FREE, 2), timeout_s=SHORT_S)
    worker.let_go()
    thread.join(PATIENCE_S)
    assert_exact(results[0], make_inputs(GATED, 1))
    assert_goes_on(client)


def test_with_a_fallback_it_is_computed_and_stays_as_it_is(
    worker: GatedWorker, transport: str
) -> None:
    with moeshm.connect(
        worker.address, transport=transport, fallback=ArithmeticBackend()
    ) as client:
        first = client.submit(*make_inputs(GATED, 1))
        worker.next_turn()
        inputs = make_inputs(FREE, 2)
        out = np.empty_like(inputs[1])
        with within(SOON_S):
            client.submit(*inputs, out=out, timeout_s=SHORT_S).result()
        assert_exact(out, inputs)
        # What comes for it does not get there any more.
        out[...] = 7
        worker.let_go()
        assert_exact(first.result(), make_inputs(GATED, 1))
        assert_goes_on(client)
        assert (out == 7).all()


def test_the_first_ends_the_session_at_its_own_deadline(
    worker: GatedWorker, client: moeshm.ExpertClient
) -> None:
    """Calls that were given up, and that nobody asks for, hold up none."""
    first = client.submit(*make_inputs(GATED, 1), timeout_s=4 * SHORT_S)
    worker.next_turn()
    last = client.submit(*make_inputs(FREE, 3), timeout_s=SOON_S)
    with within(SOON_S), pytest.raises(DeadlineExceeded, match="earlier calls of this client"):
        client.submit(*make_inputs(FREE, 2), timeout_s=SHORT_S).result()
    with within(SOON_S), pytest.raises(DeadlineExceeded, match="the session is given up"):
        first.result()
    with pytest.raises(WorkerDied):
        last.result()
    worker.let_go()


def test_an_order_that_takes_long_holds_up_no_call(
    worker: GatedWorker, client: moeshm.ExpertClient
) -> None:
    link = client._link
    with link._state:
        link._pending[link.new_id()] = Order()
    client.submit(*make_inputs(GATED, 1), timeout_s=SHORT_S)
    worker.next_turn()
    with within(SOON_S), pytest.raises(DeadlineExceeded, match="the session is given up"):
        client.submit(*make_inputs(FREE, 2), timeout_s=4 * SHORT_S).result()
    worker.let_go()


class Order:
    """Waits for a worker that loads."""

    deadline = 1e12
    is_in_turn = is_done = False
    whole: object = None

    def take(self, reply: Any, record: Any) -> None:
        """As `Receiver.take`."""

    def fail(self, error: Exception) -> None:
        """As `Receiver.fail`."""


@pytest.mark.usefixtures("small_rings")
def test_a_call_that_finds_no_room_behind_one_with_more_time_ends_alone(
    worker: GatedWorker, transport: str
) -> None:
    with moeshm.connect(worker.address, transport=transport) as client:
        _find_no_room(worker, client)


def _find_no_room(worker: GatedWorker, client: moeshm.ExpertClient) -> None:
    first = client.submit(*make_inputs(GATED, 1, n_tokens=1))
    worker.next_turn()
    inputs = make_inputs(WIDE, 2, n_tokens=2000)
    with within(2 * SOON_S), pytest.raises(DeadlineExceeded, match="took no call"):
        client.compute(*inputs, timeout_s=0.4)
    if client._link.loss is not None:
        # Over a socket a part of a call may have left: nothing can follow that.
        assert client._link.session.transport.name == "stream"
        return
    worker.let_go()
    assert_exact(first.result(), make_inputs(GATED, 1, n_tokens=1))
    assert_goes_on(client)
