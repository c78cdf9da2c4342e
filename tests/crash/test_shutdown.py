"""SIGTERM, SIGINT and the end of whoever started it: a worker finishes what it was sent."""

from __future__ import annotations

import contextlib
import signal
import threading

import pytest

import moeshm
from moeshm.errors import ConnectError, WorkerDied
from tests.crash.arithmetic import FREE, GATED, assert_exact, make_inputs
from tests.crash.processes import GatedWorker, within


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_calls_that_were_sent_before_are_answered(
    worker: GatedWorker, client: moeshm.ExpertClient, number: signal.Signals
) -> None:
    inputs = [make_inputs(GATED, tag) for tag in range(5)]
    futures = [client.submit(*each) for each in inputs]
    assert worker.next_turn() == (GATED, 0)
    worker.process.signal(number)
    worker.process.log.read_until(f"{number.name}: draining")
    worker.let_go(5)
    for future, each in zip(futures, inputs, strict=True):
        assert_exact(future.result(), each)
    assert worker.process.wait() == 0
    assert "after 5 calls" in worker.process.log.read_rest()
    assert not worker.path.exists()
    with pytest.raises(WorkerDied, match="the worker shuts down"):
        client.compute(*make_inputs(FREE))


def test_new_clients_are_not_taken_while_it_drains(
    worker: GatedWorker, client: moeshm.ExpertClient, transport: str
) -> None:
    future = client.submit(*make_inputs(GATED, 1))
    worker.next_turn()
    worker.process.signal(signal.SIGTERM)
    worker.process.log.read_until("draining")
    # The path goes before the sessions do.
    while worker.path.exists():
        pass
    with pytest.raises(ConnectError, match="no worker answers"):
        moeshm.connect(worker.address, transport=transport)
    worker.let_go()
    assert_exact(future.result(), make_inputs(GATED, 1))
    assert worker.process.wait() == 0


def test_clients_that_never_pause_do_not_keep_it(worker: GatedWorker, transport: str) -> None:
    """What they sent before the end is answered; the rest is told why not."""
    reasons: list[str] = []

    def call() -> None:
        with moeshm.connect(worker.address, transport=transport) as client:
            for tag in range(1_000_000):
                inputs = make_inputs(FREE, tag % 64)
                try:
                    assert_exact(client.compute(*inputs), inputs)
                except WorkerDied as error:
                    reasons.append(str(error))
                    return

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        worker.next_turn()
    drain = threading.Thread(target=_read_turns, args=(worker,))
    drain.start()
    worker.process.signal(signal.SIGTERM)
    with within(10):
        assert worker.process.wait() == 0
    for thread in [*threads, drain]:
        thread.join(20)
        assert not thread.is_alive()
    assert len(reasons) == 3
    assert all("the worker shuts down" in reason for reason in reasons), reasons


def _read_turns(worker: GatedWorker) -> None:
    """Until the worker is gone, so that it need not wait for the pipe."""
    with contextlib.suppress(EOFError):
        while True:
            worker.next_turn()


def test_an_idle_client_is_told(worker: GatedWorker, client: moeshm.ExpertClient) -> None:
    worker.process.signal(signal.SIGTERM)
    assert worker.process.wait() == 0
    assert "the worker shuts down" in worker.process.log.read_rest()
    with pytest.raises(WorkerDied, match="the worker shuts down"):
        client.compute(*make_inputs(FREE))


def test_a_second_signal_ends_it_at_once(worker: GatedWorker, client: moeshm.ExpertClient) -> None:
    future = client.submit(*make_inputs(GATED, 1))
    worker.next_turn()
    worker.process.signal(signal.SIGTERM)
    worker.process.log.read_until("draining")
    while worker.path.exists():
        pass
    worker.process.signal(signal.SIGTERM)
    with within(10):
        assert worker.process.wait() == -signal.SIGTERM
    with pytest.raises(WorkerDied):
        future.result()
