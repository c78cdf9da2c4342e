"""Many threads with one client, many clients with one worker: exact, in any order, and fair."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable

import pytest

import moeshm
from tests.crash.arithmetic import FREE, GATED, WIDE, assert_exact, make_inputs
from tests.crash.processes import GatedWorker

PATIENCE_S = 40.0


def run_threads(targets: list[Callable[[], None]]) -> None:
    """Each in a thread; what one of them raises is raised here."""
    failures: list[BaseException] = []

    def guarded(target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def call_often(client: moeshm.ExpertClient, thread: int, n_calls: int = 40) -> None:
    """Some at once, some in flight together, of several sizes."""
    rng = random.Random(thread)
    for first in range(0, n_calls, 4):
        inputs = [
            make_inputs(rng.choice((FREE, WIDE)), 1000 * thread + tag, rng.randint(1, 9))
            for tag in range(first, first + 4)
        ]
        futures = [client.submit(*each) for each in inputs]
        order = rng.sample(range(4), 4)
        for n in order:
            assert_exact(futures[n].result(), inputs[n])


def test_many_threads_with_one_client(client: moeshm.ExpertClient) -> None:
    run_threads([lambda n=n: call_often(client, n) for n in range(6)])  # type: ignore[misc]
    stats = client.stats()
    assert stats.calls == stats.messages == 240
    assert stats.reconnects == 0


def test_many_clients_with_one_worker(worker: GatedWorker, transport: str) -> None:
    clients = [moeshm.connect(worker.address, transport=transport) for _ in range(5)]
    try:
        run_threads(
            [lambda n=n, c=c: call_often(c, n) for n, c in enumerate(clients)]  # type: ignore[misc]
        )
    finally:
        for client in clients:
            client.close()
    for _ in clients:
        assert "after 40 calls" in worker.process.log.read_until("session ended after")


def test_results_may_be_asked_for_in_any_order(client: moeshm.ExpertClient) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    order = random.Random(seed).sample(range(30), 30)
    inputs = [make_inputs(FREE, tag) for tag in range(30)]
    futures = [client.submit(*each) for each in inputs]
    for n in order:
        assert_exact(futures[n].result(), inputs[n])
    stats = client.stats()
    # Also of those that another call's wait took in.
    reply_bytes = sum(64 + each.hidden_states.nbytes for each in inputs)
    assert stats.bytes_in == reply_bytes


def test_one_future_may_be_asked_by_several_threads(
    client: moeshm.ExpertClient, worker: GatedWorker
) -> None:
    inputs = make_inputs(GATED, 1)
    future = client.submit(*inputs)

    def ask() -> None:
        assert_exact(future.result(), inputs)

    def let_go() -> None:
        worker.next_turn()
        worker.let_go()

    run_threads([ask, ask, ask, let_go])
    assert client.stats().bytes_in == 64 + inputs.hidden_states.nbytes


def test_a_forgotten_future_harms_nobody(client: moeshm.ExpertClient) -> None:
    for tag in range(50):
        client.submit(*make_inputs(FREE, tag))
    inputs = make_inputs(FREE, 51)
    assert_exact(client.compute(*inputs), inputs)
    assert not client._link._pending


def test_a_flood_starves_nobody(worker: GatedWorker, transport: str) -> None:
    """Turns go round the sessions that wait, however much one of them has in its ring."""
    with (
        moeshm.connect(worker.address, transport=transport) as flood,
        moeshm.connect(worker.address, transport=transport) as second,
        moeshm.connect(worker.address, transport=transport) as third,
    ):
        futures = [flood.submit(*make_inputs(GATED, tag)) for tag in range(20)]
        assert worker.next_turn() == (GATED, 0)
        futures += [second.submit(*make_inputs(GATED, 100 + n)) for n in range(2)]
        worker.wait_until_queued()
        futures += [third.submit(*make_inputs(GATED, 200 + n)) for n in range(2)]
        worker.wait_until_queued()
        turns: list[int] = []
        for expected_next in (100, 200):
            worker.let_go()
            layer, tag = worker.next_turn()
            assert (layer, tag) == (GATED, expected_next)
            turns.append(tag)
            # The one that has just had its turn comes back to the end of the queue.
        worker.let_go(22)
        while len(turns) < 23:
            turns.append(worker.next_turn()[1])
        for future in futures:
            future.result()
    assert sorted(turns) == [*range(1, 20), 100, 101, 200, 201]
    # In order within each session.
    for low in (0, 100, 200):
        own = [tag for tag in turns if low <= tag < low + 100]
        assert own == sorted(own)


@pytest.mark.parametrize("n_clients", [24])
def test_many_connect_at_once(worker: GatedWorker, transport: str, n_clients: int) -> None:
    def connect_and_call(n: int) -> None:
        with moeshm.connect(worker.address, transport=transport) as client:
            inputs = make_inputs(FREE, n)
            assert_exact(client.compute(*inputs), inputs)

    run_threads([lambda n=n: connect_and_call(n) for n in range(n_clients)])  # type: ignore[misc]
