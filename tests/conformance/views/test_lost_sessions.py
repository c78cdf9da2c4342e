"""Views of a session that is lost: the next one holds them again, or is refused."""

from __future__ import annotations

import threading

import pytest

import moeshm
from moeshm.errors import CheckpointError, ClientClosed, HandshakeRefused, InvalidCall, WorkerDied
from moeshm.layers import fingerprint_of
from tests.wire import PATIENCE_S, meanwhile

from .serving import FIRST, NEWER, Worker, assert_means, listed, some_call


def lose(worker: Worker, client: moeshm.ExpertClient) -> None:
    """End the client's session from the worker's side, whose thread closes the rest."""
    worker.sessions[0].transport.close()
    with pytest.raises(WorkerDied):
        some_call(client)


def test_views_are_held_again_by_a_new_session(worker: Worker, client: moeshm.ExpertClient) -> None:
    view = client.hold(NEWER)
    released = client.hold({1: (2,)})
    client.release(released)
    lose(worker, client)
    assert_means(client, NEWER, view)
    assert_means(client, FIRST)
    with pytest.raises(InvalidCall, match="was released"):
        some_call(client, released)
    assert client.stats().reconnects == 1
    # What another offers is what the next session begins with.
    with moeshm.connect(worker.address, transport=client.transport) as other:
        other.offer(other.hold({2: (0, 1)}))
    # The client's first session, and that one.
    for _ in range(2):
        assert worker.ended.acquire(timeout=PATIENCE_S)
    worker.sessions[0] = worker.sessions[1]
    lose(worker, client)
    assert_means(client, NEWER, view)
    assert_means(client, FIRST)
    some_call(client, client.hold({0: (3,)}))
    assert client.stats().reconnects == 2
    assert worker.held() == sorted({*listed(FIRST), *listed(NEWER), *listed({0: (3,), 2: (0, 1)})})


def test_a_new_session_that_cannot_hold_them_is_refused(
    worker: Worker, client: moeshm.ExpertClient
) -> None:
    view = client.hold(NEWER)
    with moeshm.connect(worker.address, transport=client.transport) as other:
        other.offer(other.hold({1: (0,)}))
        other.release(other.view)
        worker.error = CheckpointError("the files are gone")
        lose(worker, client)
        assert worker.ended.acquire(timeout=PATIENCE_S)
        with pytest.raises(WorkerDied, match=r"not those again \(the files are gone\)"):
            some_call(client, view)


def test_a_placement_is_of_the_first_session_alone(worker: Worker, transport: str) -> None:
    placement = fingerprint_of(FIRST)
    with moeshm.connect(worker.address, transport=transport, placement=placement) as client:
        client.offer(client.hold(NEWER))
        some_call(client)
        lose(worker, client)
        assert_means(client, FIRST)
    with pytest.raises(HandshakeRefused, match="placement gives this worker"):
        moeshm.connect(worker.address, transport=transport, placement=placement)
    moeshm.connect(worker.address, transport=transport, placement=fingerprint_of(NEWER)).close()


def test_a_client_that_is_closed_while_it_holds_its_views_again(
    worker: Worker, client: moeshm.ExpertClient
) -> None:
    """Neither the session nor the thread that opened it stays until they are loaded."""
    client.hold({2: (3,)})
    lose(worker, client)
    assert worker.ended.acquire(timeout=PATIENCE_S)
    worker.is_gated = True
    assert worker.load_begun.acquire(timeout=PATIENCE_S)  # of the first session

    def call() -> None:
        with pytest.raises(ClientClosed):
            some_call(client)

    with meanwhile(call):
        assert worker.load_begun.acquire(timeout=PATIENCE_S)
        looking = [each for each in threading.enumerate() if each.name == "moeshm-reconnect"]
        client.close()
        for thread in looking:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
    assert looking
    assert worker.ended.acquire(timeout=PATIENCE_S)


def test_a_worker_that_goes_while_it_loads(worker: Worker, client: moeshm.ExpertClient) -> None:
    worker.is_gated = True

    def hold() -> None:
        with pytest.raises(WorkerDied):
            client.hold(NEWER, timeout_s=PATIENCE_S)

    with meanwhile(hold):
        assert worker.load_begun.acquire(timeout=PATIENCE_S)
        # Its own thread closes the rest.
        worker.sessions[0].transport.close()
