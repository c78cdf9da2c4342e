"""A call is of the view that it names, whatever is loaded and dropped meanwhile."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import moeshm
from moeshm import orders, protocol, session
from moeshm.checkpoint import ExpertLayer
from moeshm.dtypes import DType
from moeshm.errors import (
    CheckpointError,
    ClientClosed,
    DeadlineExceeded,
    HandshakeRefused,
    InvalidCall,
    MoeshmError,
    SettingError,
    WorkerDied,
    WorkerFailed,
)
from moeshm.held import HeldView
from moeshm.holdings import Holdings
from moeshm.layers import Activation, fingerprint_of
from moeshm.orders import MAX_VIEWS, Hold, Release
from moeshm.session import ControlSocket, Session
from moeshm.turns import Turns
from moeshm.views import SessionViews
from moeshm.worker import SessionServer
from tests import growing
from tests.growing import Experts, GrowingArithmetic, draw, expected, globally
from tests.wire import PATIENCE_S, meanwhile

FIRST = {0: (0, 1, 2), 1: (5, 1)}
MAX_TOKENS = 8


class Worker:
    """Serves any number of sessions in threads of this process; its loads wait if told to."""

    def __init__(self, path: Path) -> None:
        self.address = f"unix:{path}"
        self.backend = GrowingArithmetic(FIRST)
        self.sessions: list[Session] = []
        self.error: Exception | None = None
        #: What was read from the checkpoint.
        self.loaded: list[Experts] = []
        self.is_gated = False
        self.load_begun = threading.Semaphore(0)
        self.load_may_end = threading.Semaphore(0)
        #: A session is over, and released everything.
        self.ended = threading.Semaphore(0)
        self._holdings = Holdings(self.backend, self._load)
        self._turns = Turns()
        self._draining = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def held(self) -> list[tuple[int, int]]:
        """Layer and expert of each that the backend holds."""
        return sorted((layer, expert) for (layer, _), expert in self.backend.slots.items())

    def close(self) -> None:
        """End every session, once it has answered what came; again does nothing."""
        if self._draining.is_set():
            return
        self._draining.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for _ in range(10):
            self.load_may_end.release()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        self._listener.close()

    def _start(self, work: Any, *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        control = ControlSocket(connection)
        with SessionViews(self._holdings) as views, contextlib.suppress(MoeshmError):
            name = self.backend.name
            with session.accept(control, views.layers, name, MAX_TOKENS, PATIENCE_S) as opened:
                self.sessions.append(opened)
                SessionServer(opened, views, self._turns, self._draining).serve()
        control.close()
        self.ended.release()

    def _load(self, experts: Experts) -> dict[int, ExpertLayer]:
        self.load_begun.release()
        if self.is_gated:
            assert self.load_may_end.acquire(timeout=PATIENCE_S)
        if self.error is not None:
            raise self.error
        if not experts.keys() <= set(growing.LAYERS):
            raise CheckpointError(f"layers {sorted(experts)} cannot be loaded")
        self.loaded.append(experts)
        return growing.load(experts)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    serving = Worker(tmp_path / "s")
    yield serving
    serving.close()


@pytest.fixture(params=["shared", "stream"])
def transport(request: pytest.FixtureRequest) -> str:
    """How calls travel."""
    return str(request.param)


@pytest.fixture
def client(worker: Worker, transport: str) -> Iterator[moeshm.ExpertClient]:
    with moeshm.connect(worker.address, transport=transport) as connected:
        yield connected


def assert_means(
    client: moeshm.ExpertClient, experts: Experts, view: HeldView | None = None, **named: Any
) -> None:
    """Calls of this view are of these experts, in one message and in several."""
    rng = np.random.default_rng(5)
    layers = client.layers if view is None else view.layers
    assert {n: info.experts for n, info in layers.items()} == {
        n: tuple(ids) for n, ids in experts.items()
    }
    for layer, ids in experts.items():
        for n_tokens in (1, 3, 3 * MAX_TOKENS + 1):
            hidden, local, weights = draw(rng, len(ids), n_tokens)
            wanted = expected(layer, hidden, globally(local, ids), weights)
            found = client.compute(layer, hidden, local, weights, view=view, **named)
            np.testing.assert_array_equal(found, wanted)
            found = client.submit(layer, hidden, local, weights, view=view, **named).result()
            np.testing.assert_array_equal(found, wanted)
            found = client.compute(
                layer, hidden, globally(local, ids), weights, view=view, global_ids=True, **named
            )
            np.testing.assert_array_equal(found, wanted)


def listed(experts: Experts) -> list[tuple[int, int]]:
    """Layer and expert of each, as `Worker.held`."""
    return sorted((layer, each) for layer, ids in experts.items() for each in ids)


def some_call(client: moeshm.ExpertClient, view: HeldView | None = None) -> Any:
    """One token for layer 0."""
    hidden, _, weights = draw(np.random.default_rng(1), 1, 1)
    return client.compute(0, hidden, np.zeros_like(weights, np.int32), weights, view=view)


NEWER = {0: (5, 1, 0), 2: (3,)}

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


# --- a new session ------------------------------------------------------------------------


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


def test_a_fallback_computes_calls_of_every_view(worker: Worker, transport: str) -> None:
    # More than the worker's, in another order.
    fallback = GrowingArithmetic({0: (4, 2, 1, 0, 3), 1: range(6), 2: range(6)})
    with moeshm.connect(worker.address, transport=transport, fallback=fallback) as client:
        with pytest.raises(InvalidCall, match="the fallback does not hold expert 5 of layer 0"):
            client.hold(NEWER)
        view = client.hold({0: (2, 0), 2: (3, 5)})
        worker.close()
        assert_means(client, {0: (2, 0), 2: (3, 5)}, view)
        assert_means(client, FIRST)
        assert client.stats().fallback_calls == 36


@pytest.mark.parametrize("held", [{0: (0, 1), 1: (5, 1)}, {0: (0, 1, 2)}])
def test_a_fallback_that_lacks_an_expert_is_refused(
    worker: Worker, transport: str, held: Experts
) -> None:
    with pytest.raises(SettingError, match=r"the fallback does not hold expert \d of layer \d"):
        moeshm.connect(worker.address, transport=transport, fallback=GrowingArithmetic(held))


def test_a_fallback_of_another_model_is_refused(worker: Worker, transport: str) -> None:
    """At once, or with the view whose layers it has otherwise."""
    fallback = GrowingArithmetic({**FIRST, 2: range(6)})
    layers = dict(fallback.layers)
    fallback.layers = {**layers, 1: msgspec.structs.replace(layers[1], top_k=2)}
    with pytest.raises(SettingError, match="has layer 1 with top_k=2, and the worker with 3"):
        moeshm.connect(worker.address, transport=transport, fallback=fallback)
    geglu = msgspec.structs.replace(layers[2], activation=Activation.GEGLU)
    fallback.layers = {**layers, 2: geglu}
    with moeshm.connect(worker.address, transport=transport, fallback=fallback) as client:
        with pytest.raises(InvalidCall, match="layer 2 with activation=geglu, and the worker with"):
            client.hold({2: (3,)})
        # The worker was told.
        some_call(client)
        assert worker.held() == listed(FIRST)
