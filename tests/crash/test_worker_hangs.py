"""A worker that stands still: the deadline holds, and its late words harm nobody."""

from __future__ import annotations

import signal
import threading
import time

import numpy as np
import pytest

import moeshm
from moeshm.demo import tiny_moe_path
from moeshm.errors import DeadlineExceeded, NotReady, WorkerDied
from tests.crash.arithmetic import FREE, GATED, ArithmeticBackend, assert_exact, make_inputs
from tests.crash.processes import GatedWorker, stop, within

DEADLINE_S = 0.4
SOON_S = 15.0


def test_the_deadline_ends_the_call_and_the_session(
    worker: GatedWorker, client: moeshm.ExpertClient
) -> None:
    patient = client.submit(*make_inputs(FREE, 1))
    patient.result()
    worker.process.stop()
    in_flight = client.submit(*make_inputs(GATED, 2))
    start = time.monotonic()
    with within(SOON_S), pytest.raises(DeadlineExceeded, match=r"within 0\.4 s"):
        client.compute(*make_inputs(GATED, 3), timeout_s=DEADLINE_S)
    assert time.monotonic() - start >= DEADLINE_S
    # Their session is given up, and so are they.
    with within(SOON_S), pytest.raises(WorkerDied):
        in_flight.result()


def test_late_replies_are_ignored(worker: GatedWorker, client: moeshm.ExpertClient) -> None:
    with pytest.raises(DeadlineExceeded):
        client.compute(*make_inputs(GATED, 1), timeout_s=DEADLINE_S)
    worker.process.stop()
    worker.let_go(1)
    worker.process.signal(signal.SIGCONT)
    for tag in range(2, 6):
        inputs = make_inputs(FREE, tag)
        assert_exact(client.compute(*inputs), inputs)
    assert client.stats().reconnects == 1
    assert worker.process.log.read_until("session ended after")


def test_with_a_fallback_the_result_is_exact(worker: GatedWorker, transport: str) -> None:
    fallback = ArithmeticBackend()
    with moeshm.connect(
        worker.address, transport=transport, fallback=fallback, timeout_s=0.5
    ) as client:
        worker.process.stop()
        inputs = make_inputs(FREE, 1)
        with within(SOON_S):
            assert_exact(client.compute(*inputs, timeout_s=DEADLINE_S), inputs)
        assert client.stats().fallbacks == {"deadline": 1}
        # The handshake with it is not answered either.
        with within(SOON_S):
            assert_exact(client.compute(*inputs, timeout_s=DEADLINE_S), inputs)
        assert client.stats().fallback_calls == 2


def test_a_spawned_worker_that_hangs_is_replaced(transport: str) -> None:
    call = (
        0,
        np.ones((1, 128), np.float32),
        np.zeros((1, 4), np.int32),
        np.ones((1, 4), np.float32),
    )
    with moeshm.spawn_worker(tiny_moe_path(), threads=1, transport=transport) as client:
        expected = client.compute(*call)
        hanging = client.worker_pid
        stop(hanging)
        with pytest.raises(DeadlineExceeded):
            client.compute(*call, timeout_s=DEADLINE_S)
        with within(SOON_S):
            np.testing.assert_array_equal(client.compute(*call), expected)
        assert client.worker_pid != hanging
        assert client.stats().worker_restarts == 1
        stop(client.worker_pid)
        with within(SOON_S):
            client.close()


def test_not_ready_leaves_the_call_on_its_way(
    worker: GatedWorker, client: moeshm.ExpertClient
) -> None:
    inputs = make_inputs(GATED, 4)
    future = client.submit(*inputs)
    for _ in range(2):
        with within(SOON_S), pytest.raises(NotReady, match="still on its way"):
            future.result(timeout_s=0.05)
        assert not future.done()
    worker.let_go()
    assert_exact(future.result(), inputs)
    assert future.result() is future.result()


def test_a_call_whose_deadline_passes_before_its_turn_is_told_so_by_the_worker(
    worker: GatedWorker, client: moeshm.ExpertClient
) -> None:
    """It waits no longer than its deadline, and is not computed for nobody."""
    first = client.submit(*make_inputs(GATED, 1))
    second = client.submit(*make_inputs(FREE, 2), timeout_s=DEADLINE_S)
    worker.next_turn()
    with pytest.raises(NotReady):
        first.result(timeout_s=DEADLINE_S)
    worker.let_go()
    assert_exact(first.result(), make_inputs(GATED, 1))
    # Whoever waits for the third takes in the answer to the second.
    inputs = make_inputs(FREE, 3)
    assert_exact(client.compute(*inputs), inputs)
    with pytest.raises(DeadlineExceeded, match="before the call's turn"):
        second.result()
    assert client.stats().reconnects == 0
    assert worker.next_turn() == (FREE, 3)


def test_a_stopped_worker_and_many_waiting_threads(
    worker: GatedWorker, client: moeshm.ExpertClient
) -> None:
    """Each thread gets an answer, whoever of them receives."""
    worker.process.stop()
    answers: list[type[BaseException]] = []

    def call(tag: int) -> None:
        try:
            client.compute(*make_inputs(FREE, tag), timeout_s=DEADLINE_S + tag / 100)
        except (DeadlineExceeded, WorkerDied) as error:
            answers.append(type(error))

    # Those that come late find the session lost, and must not wait for a handshake.
    threads = [threading.Thread(target=call, args=(tag,)) for tag in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SOON_S)
        assert not thread.is_alive()
    assert len(answers) == 5
    assert DeadlineExceeded in answers
