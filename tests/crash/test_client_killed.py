"""A client that is killed: the worker frees its session, and other clients notice nothing."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

import pytest

import moeshm
from tests.crash.arithmetic import FREE, GATED, assert_exact, make_inputs
from tests.crash.processes import GatedWorker, Process, mapped_rings, open_fds, running

#: Connects, submits so many calls, says so, and waits.
VICTIM = """
import sys
import moeshm
from tests.crash.arithmetic import make_inputs

address, transport, layer, n_calls = sys.argv[1:]
client = moeshm.connect(address, transport=transport)
calls = [client.submit(*make_inputs(int(layer), tag)) for tag in range(int(n_calls))]
print("submitted", flush=True)
sys.stdin.readline()
"""
#: The same with a forked child that outlives it, and holds its fds.
VICTIM_WITH_CHILD = VICTIM.replace(
    "sys.stdin.readline()",
    """
import os, signal
if os.fork() == 0:
    os.close(1); os.close(2)
    sys.stdin.readline()
    os._exit(0)
print("forked", flush=True)
signal.pause()
""",
)


@contextlib.contextmanager
def victim(
    worker: GatedWorker, transport: str, layer: int, n_calls: int, code: str = VICTIM
) -> Iterator[Process]:
    arguments = ["-c", code, worker.address, transport, str(layer), str(n_calls)]
    with running(arguments) as process:
        process.output.read_until("submitted")
        yield process


def held(worker: GatedWorker) -> tuple[list[str], int]:
    """What sessions cost a worker."""
    return open_fds(worker.process.pid), mapped_rings(worker.process.pid)


def test_an_idle_session_is_freed(worker: GatedWorker, transport: str) -> None:
    before = held(worker)
    with victim(worker, transport, FREE, 0) as process:
        assert held(worker) != before
        process.kill()
    worker.process.log.read_until("session ended after 0 calls")
    assert held(worker) == before


@pytest.mark.parametrize("n_calls", [1, 20])
def test_a_session_with_calls_in_flight_is_freed(
    worker: GatedWorker, transport: str, n_calls: int
) -> None:
    before = held(worker)
    with victim(worker, transport, GATED, n_calls) as process:
        assert worker.next_turn() == (GATED, 0)
        process.kill()
    worker.let_go(n_calls)
    worker.process.log.read_until("session ended after")
    assert held(worker) == before


def test_what_a_dead_client_sent_does_not_keep_the_worker(
    worker: GatedWorker, transport: str
) -> None:
    """Its session ends with the call that is being computed, not with the last in the ring."""
    before = held(worker)
    with victim(worker, transport, GATED, 20) as process:
        assert worker.next_turn() == (GATED, 0)
        process.kill()
    # Longer than a call that is too short to look in between.
    with pytest.raises(subprocess.TimeoutExpired):
        worker.process.wait(0.05)
    worker.let_go()
    worker.process.log.read_until("session ended after")
    assert held(worker) == before


def test_a_session_is_freed_though_a_forked_child_holds_its_fds(
    worker: GatedWorker, transport: str
) -> None:
    before = held(worker)
    with victim(worker, transport, FREE, 3, VICTIM_WITH_CHILD) as process:
        process.output.read_until("forked")
        process.kill()
        worker.process.log.read_until("session ended after 3 calls")
        assert held(worker) == before


def test_other_clients_notice_nothing(
    worker: GatedWorker, client: moeshm.ExpertClient, transport: str
) -> None:
    for round_ in range(3):
        with victim(worker, transport, GATED, 2) as process:
            while worker.next_turn()[0] != GATED:
                pass
            inputs = [make_inputs(FREE, 10 * round_ + n) for n in range(4)]
            futures = [client.submit(*each) for each in inputs]
            process.kill()
        worker.let_go(2)
        for future, each in zip(futures, inputs, strict=True):
            assert_exact(future.result(), each)
        worker.process.log.read_until("session ended after")
    assert client.stats().reconnects == 0


def test_clients_that_come_and_go_leave_nothing(worker: GatedWorker, transport: str) -> None:
    before = held(worker)
    for tag in range(5):
        with moeshm.connect(worker.address, transport=transport) as client:
            inputs = make_inputs(FREE, tag)
            assert_exact(client.compute(*inputs), inputs)
        worker.process.log.read_until("session ended after 1 calls")
    assert held(worker) == before


def test_a_client_that_closes_with_calls_in_flight(worker: GatedWorker, transport: str) -> None:
    before = held(worker)
    client = moeshm.connect(worker.address, transport=transport)
    futures = [client.submit(*make_inputs(GATED, tag)) for tag in range(3)]
    worker.next_turn()
    client.close()
    for future in futures:
        with pytest.raises(moeshm.errors.ClientClosed, match="closed"):
            future.result()
    with pytest.raises(moeshm.errors.ClientClosed):
        client.compute(*make_inputs(FREE))
    client.close()
    worker.let_go(3)
    worker.process.log.read_until("session ended after")
    assert held(worker) == before
