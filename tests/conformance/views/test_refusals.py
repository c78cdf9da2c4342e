"""Views that cannot be, or cannot be had: refused by name, and nothing else is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moeshm
from moeshm import orders, protocol, session
from moeshm.dtypes import DType
from moeshm.errors import CheckpointError, DeadlineExceeded, InvalidCall, MoeshmError, WorkerFailed
from moeshm.orders import MAX_VIEWS, Hold, Release
from moeshm.session import Session
from tests.growing import Experts, draw
from tests.wire import PATIENCE_S, meanwhile

from .serving import FIRST, MAX_TOKENS, NEWER, Worker, assert_means, listed, some_call

# --- what cannot be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "says"),
    [
        ({7: (0,)}, r"layers \[7\] cannot be loaded"),
        ({0: (6,)}, "layer 0 has no expert 6"),
        ({0: (1, 1)}, "asked for twice"),
        ({}, "a view of no layer"),
        ({0: range(200_000)}, "131072 is the most"),
    ],
)
def test_a_view_that_cannot_be_is_refused_by_name(
    worker: Worker, client: moeshm.ExpertClient, experts: Experts, says: str
) -> None:
    before = worker.held()
    with pytest.raises(InvalidCall, match=says):
        client.hold(experts)
    assert_means(client, FIRST)
    assert worker.held() == before
    assert_means(client, NEWER, client.hold(NEWER))


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (OSError("the disk is gone"), WorkerFailed, "OSError: the disk is gone"),
        (MemoryError("1 TiB"), WorkerFailed, "no memory for more experts"),
        (CheckpointError("no tensor 'x'"), InvalidCall, "no tensor 'x'"),
    ],
)
def test_a_load_that_fails_leaves_the_session_as_it_was(
    worker: Worker,
    client: moeshm.ExpertClient,
    error: Exception,
    kind: type[MoeshmError],
    says: str,
) -> None:
    before = worker.held()
    worker.error = error
    with pytest.raises(kind, match=says):
        client.hold(NEWER)
    assert worker.held() == before
    assert_means(client, FIRST)
    worker.error = None
    assert_means(client, NEWER, client.hold(NEWER))


def test_a_load_that_takes_too_long_is_taken_back(
    worker: Worker, client: moeshm.ExpertClient
) -> None:
    worker.is_gated = True
    with pytest.raises(DeadlineExceeded, match=r"not loaded within 0\.0\d+ s; allow more time"):
        client.hold(NEWER, timeout_s=0.05)
    assert_means(client, FIRST)
    worker.is_gated = False
    worker.load_may_end.release()
    # Comes after it, and lists none of its experts.
    assert_means(client, {1: (1,)}, client.hold({1: (1,)}))
    assert worker.held() == listed(FIRST)
    assert worker.loaded == [{0: (5,)}]


def test_what_was_taken_back_before_its_turn_is_not_loaded(
    worker: Worker, client: moeshm.ExpertClient, transport: str
) -> None:
    """Neither behind another order of the session, nor behind another session's."""
    worker.is_gated = True
    with moeshm.connect(worker.address, transport=transport) as other:
        with meanwhile(lambda: client.hold({2: (1,)})):
            assert worker.load_begun.acquire(timeout=PATIENCE_S)
            for impatient in (client, other):
                with pytest.raises(DeadlineExceeded):
                    impatient.hold({2: (5,)}, timeout_s=0.05)
                # The release has arrived.
                some_call(impatient)
            worker.load_may_end.release()
        worker.is_gated = False
        # Comes after it.
        other.hold({2: (4,)})
        client.hold({2: (4,)})
    assert worker.loaded == [{2: (1,)}, {2: (4,)}]


def test_only_so_many_views(client: moeshm.ExpertClient) -> None:
    views = [client.hold({0: (0,)}) for _ in range(MAX_VIEWS - 1)]
    with pytest.raises(InvalidCall, match=f"{MAX_VIEWS} is the most"):
        client.hold(NEWER)
    client.release(views[0])
    assert_means(client, NEWER, client.hold(NEWER))


# --- the worker's side, by its bytes ------------------------------------------------------


def ask(raw: Session, order: Hold | Release | None, parts: Any = None) -> protocol.Reply:
    """Send an order, or a call, and receive."""
    if order is None:
        raw.transport.write(parts, protocol.CALL)
    else:
        raw.transport.write((orders.pack_order(order),), protocol.ORDER)
    record = raw.transport.acquire(PATIENCE_S)
    try:
        return protocol.parse_reply(record)
    finally:
        record.release()


def call_of(view: int) -> Any:
    hidden, ids, weights = draw(np.random.default_rng(1), 1, 1)
    return protocol.pack_call(99, 0, hidden, ids, weights, DType.F32, 0, view)


def test_a_call_of_an_unknown_view_is_refused(worker: Worker, transport: str) -> None:
    with session.connect(worker.address, transport, MAX_TOKENS, PATIENCE_S) as raw:
        reply = ask(raw, None, call_of(7))
        assert (reply.call_id, type(reply.error)) == (99, InvalidCall)
        assert "view 7 is not held in this session; it holds [0]" in str(reply.error)
        assert ask(raw, Hold(5, 7, {0: (1,)})).call_id == 5
        assert ask(raw, None, call_of(7)).error is None
        raw.transport.write((orders.pack_order(Release(7)),), protocol.ORDER)
        assert "it holds [0]" in str(ask(raw, None, call_of(7)).error)


def test_a_number_is_used_once_at_a_time(worker: Worker, transport: str) -> None:
    worker.is_gated = True
    with session.connect(worker.address, transport, MAX_TOKENS, PATIENCE_S) as raw:
        assert "view 0 is in use" in str(ask(raw, Hold(5, 0, NEWER)).error)
        raw.transport.write((orders.pack_order(Hold(6, 3, NEWER)),), protocol.ORDER)
        assert "view 3 is in use" in str(ask(raw, Hold(7, 3, NEWER)).error)
        # One that is not there yet, and one that never was.
        for number in (3, 9):
            raw.transport.write((orders.pack_order(Release(number)),), protocol.ORDER)
        assert "view 3 is not held" in str(ask(raw, None, call_of(3)).error)
        worker.load_may_end.release()
        record = raw.transport.acquire(PATIENCE_S)
        reply = protocol.parse_reply(record)
        record.release()
        assert reply.call_id == 6
        assert "released before it was loaded" in str(reply.error)
        for _layer in NEWER:
            worker.load_may_end.release()
        assert ask(raw, Hold(8, 3, NEWER)).error is None
