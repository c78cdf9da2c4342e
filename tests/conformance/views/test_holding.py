"""A call is of the view that it names, whatever is loaded and dropped meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import moeshm
from moeshm.errors import ClientClosed, DeadlineExceeded, InvalidCall
from moeshm.held import HeldView
from moeshm.layers import fingerprint_of
from tests.growing import Experts, draw, expected, globally
from tests.wire import PATIENCE_S, meanwhile

from .serving import FIRST, NEWER, Worker, assert_means, listed, some_call

# --- holding ------------------------------------------------------------------------------


def test_each_view_keeps_its_meaning(client: moeshm.ExpertClient) -> None:
    first = client.hold(NEWER)
    second = client.hold({1: (0, 1, 2, 3, 4, 5)})
    third = client.hold(NEWER)
    for _ in range(2):
        assert_means(client, NEWER, first)
        assert_means(client, {1: (0, 1, 2, 3, 4, 5)}, second)
        assert_means(client, NEWER, third)
        assert_means(client, FIRST)
        assert_means(client, FIRST, client.view)


def test_calls_before_and_after_are_of_their_own_view(
    worker: Worker, client: moeshm.ExpertClient
) -> None:
    """Local id 0 is another expert in each; those on their way keep theirs."""
    rng = np.random.default_rng(2)
    futures = []
    views: list[tuple[HeldView, tuple[int, ...]]] = [(client.view, FIRST[0])]
    for experts in ((5, 4), (4, 5), (2, 0)):
        views.append((client.hold({0: experts}), experts))
        for view, order in views:
            hidden, ids, weights = draw(rng, 2, 4)
            wanted = expected(0, hidden, globally(ids, order), weights)
            futures.append((client.submit(0, hidden, ids, weights, view=view), wanted))
    client.offer(views[-1][0])
    for view, _ in views:
        client.release(view)
    for future, wanted in futures:
        np.testing.assert_array_equal(future.result(), wanted)
    some_view = client.hold({0: (3,)})
    assert_means(client, {0: (3,)}, some_view)
    assert worker.held() == [(0, 0), (0, 2), (0, 3)]


def test_calls_go_on_while_experts_are_loaded(
    worker: Worker, client: moeshm.ExpertClient, transport: str
) -> None:
    worker.is_gated = True
    views: list[HeldView] = []
    with moeshm.connect(worker.address, transport=transport) as other:
        with meanwhile(lambda: views.append(client.hold(NEWER))):
            assert worker.load_begun.acquire(timeout=PATIENCE_S)
            for each in (client, other):
                assert_means(each, FIRST)
            assert not views
            for _layer in NEWER:
                worker.load_may_end.release()
        assert_means(client, NEWER, views[0])
        assert_means(other, FIRST)


def test_orders_of_one_session_are_carried_out_in_turn(
    worker: Worker, client: moeshm.ExpertClient
) -> None:
    worker.is_gated = True
    wanted = [{2: (each,)} for each in range(4)]
    views: dict[int, HeldView] = {}

    def hold(number: int) -> None:
        views[number] = client.hold(wanted[number])

    with meanwhile(*(lambda number=number: hold(number) for number in range(4))):
        for _ in wanted:
            assert worker.load_begun.acquire(timeout=PATIENCE_S)
            assert not worker.load_begun.acquire(blocking=False)
            worker.load_may_end.release()
    for number, view in views.items():
        assert_means(client, wanted[number], view)


# --- what new sessions begin with ---------------------------------------------------------


def assert_newcomers_get(worker: Worker, transport: str, experts: Experts) -> None:
    """Also by the fingerprint, which a client of a placement sends."""
    with moeshm.connect(
        worker.address, transport=transport, placement=fingerprint_of(experts)
    ) as newcomer:
        assert_means(newcomer, experts)
    assert worker.ended.acquire(timeout=PATIENCE_S)


def test_what_one_client_holds_is_no_matter_of_others(
    worker: Worker, client: moeshm.ExpertClient, transport: str
) -> None:
    """Only what is offered is, in whatever way the hold ends."""
    client.hold(NEWER)
    assert_newcomers_get(worker, transport, FIRST)
    # One that is taken back once it is loaded, and one whose session is over by then.
    worker.is_gated = True
    for end in (client.release, lambda _view: client.close()):
        with pytest.raises((DeadlineExceeded, ClientClosed)):
            client.hold({0: (3,)}, timeout_s=0.05)
        assert worker.load_begun.acquire(timeout=PATIENCE_S)
        end(client.view)
        worker.load_may_end.release()
    assert_newcomers_get(worker, transport, FIRST)


def test_what_is_offered_stays_for_newcomers(
    worker: Worker, client: moeshm.ExpertClient, transport: str
) -> None:
    view = client.hold(NEWER)
    client.offer(view)
    some_call(client)
    assert_newcomers_get(worker, transport, NEWER)
    client.release(view)
    some_call(client)
    assert_newcomers_get(worker, transport, NEWER)
    with pytest.raises(InvalidCall, match="was released"):
        client.offer(view)
    # The client's own is as good as any other.
    client.offer(client.view)
    some_call(client)
    assert_newcomers_get(worker, transport, FIRST)
    assert worker.held() == listed(FIRST)


# --- releasing ----------------------------------------------------------------------------


def test_what_nobody_lists_is_dropped(worker: Worker, client: moeshm.ExpertClient) -> None:
    view = client.hold({0: (5,), 2: (3,)})
    assert (0, 5) in worker.held()
    last = client.hold({0: (1, 4)})
    client.offer(last)
    client.release(view)
    client.release(client.view)
    # The answer comes after the releases.
    assert_means(client, {0: (1, 4)}, last)
    assert worker.held() == [(0, 1), (0, 4)]
    for gone in (view, client.view, None):
        with pytest.raises(InvalidCall, match="was released"):
            some_call(client, gone)
    with pytest.raises(InvalidCall, match="was released"):
        client.release(view)


def test_a_view_is_its_clients_own(
    worker: Worker, client: moeshm.ExpertClient, transport: str
) -> None:
    view = client.hold(NEWER)
    with moeshm.connect(worker.address, transport=transport) as other:
        with pytest.raises(InvalidCall, match="another client's"):
            some_call(other, view)
        with pytest.raises(InvalidCall, match="another client's"):
            other.release(view)
        # Its own view lists the same experts.
        own = other.hold(NEWER)
        client.release(view)
        some_call(client)
        assert_means(other, NEWER, own)
    assert worker.ended.acquire(timeout=PATIENCE_S)
    some_call(client)
    assert worker.held() == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 5)]


def test_a_session_that_ends_releases_everything(worker: Worker, transport: str) -> None:
    with moeshm.connect(worker.address, transport=transport) as client:
        client.hold(NEWER)
        client.hold({0: (4,)})
    assert worker.ended.acquire(timeout=PATIENCE_S)
    assert worker.held() == listed(FIRST)


def test_a_session_that_ends_while_it_loads(worker: Worker, transport: str) -> None:
    worker.is_gated = True
    client = moeshm.connect(worker.address, transport=transport)

    def hold() -> None:
        with pytest.raises(ClientClosed):
            client.hold(NEWER)

    with meanwhile(hold):
        assert worker.load_begun.acquire(timeout=PATIENCE_S)
        client.close()
    assert worker.ended.acquire(timeout=PATIENCE_S)
    worker.is_gated = False
    worker.load_may_end.release()
    with moeshm.connect(worker.address, transport=transport) as other:
        # Waits for the load before it.
        assert_means(other, {0: (3,)}, other.hold({0: (3,)}))
        assert worker.held() == sorted([*listed(FIRST), (0, 3)])
    # The second layer was not begun.
    assert worker.loaded == [{0: (5,)}, {0: (3,)}]


def test_who_waits_for_experts_does_not_receive_for_others(
    worker: Worker, client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever makes a call gets its reply without another thread in between."""
    waits: dict[int, set[float]] = {}
    transport = client._link._transport
    acquire = transport.acquire

    def watched(timeout_s: float | None = None) -> Any:
        waits.setdefault(threading.get_ident(), set()).add(timeout_s or 0.0)
        return acquire(timeout_s)

    monkeypatch.setattr(transport, "acquire", watched)
    holder: list[int] = []

    def hold() -> None:
        holder.append(threading.get_ident())
        client.hold(NEWER)

    worker.is_gated = True
    with meanwhile(hold):
        assert worker.load_begun.acquire(timeout=PATIENCE_S)
        assert_means(client, FIRST)
        for _layer in NEWER:
            worker.load_may_end.release()
    assert waits[holder[0]] == {0.0}
