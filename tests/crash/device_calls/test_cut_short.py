"""What goes wrong between a call's room in the slab and its launch: no stream waits for ever, and
no slot is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

import moeshm
from moeshm._words import load_word
from moeshm.device_future import Part
from moeshm.errors import (
    CallError,
    ClientClosed,
    DeadlineExceeded,
    DeviceError,
    ProtocolError,
    RingFull,
    WorkerDied,
)
from moeshm.outbox import Drain
from moeshm.transport.slab import DONE, GIVEN, SLOTS, TAKEN
from tests.crash.arithmetic import FREE, ArithmeticBackend, make_inputs
from tests.crash.device_calls.calls import (
    MORE_TOKENS,
    SOON_S,
    GpuCall,
    Kind,
    connected,
    wait_until,
    watch_of,
)
from tests.crash.processes import GatedWorker, within
from tests.engine_gpu import PATIENCE_S, HostMover, Movers, Stream


def assert_next_call_works(
    client: moeshm.ExpertClient, stream: Stream, *, n_reconnects: int = 1
) -> None:
    """In another session, or in the same one."""
    call = GpuCall.of(make_inputs(FREE, 3))
    with within(SOON_S):
        call.submit(client, stream).wait(PATIENCE_S)
    call.check()
    assert client.stats().reconnects == n_reconnects
    stream.synchronize()


def assert_let_go(mover: HostMover) -> None:
    """Nothing is on its way in that slab."""
    wait_until(lambda: mover.is_closed)


def enqueued(mover: HostMover, stream: Stream) -> tuple[int, int]:
    """Calls that were given and taken, once the stream has passed everything."""
    stream.synchronize()
    return mover.n_given, mover.n_taken


def after_descriptor(
    client: moeshm.ExpertClient, patch: pytest.MonkeyPatch, what: Callable[[], object]
) -> None:
    """The session's next call is launched after that, and the worker has its descriptor before."""
    outbox = client._link._outbox
    write = outbox.write_descriptor

    def write_and_more(descriptor: bytes, deadline: float, drain: Drain) -> int:
        n_bytes = write(descriptor, deadline, drain)
        what()
        return n_bytes

    patch.setattr(outbox, "write_descriptor", write_and_more)


# --- before the worker knows of it ----------------------------------------------------------


def test_a_ring_that_is_full(
    client: moeshm.ExpertClient, stream: Stream, movers: Movers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is launched, and neither slots nor the session are used up by it."""

    def refuse(_descriptor: bytes, _deadline: float, _drain: Drain) -> int:
        raise RingFull("no room")

    with monkeypatch.context() as patch:
        patch.setattr(client._link._outbox, "write_descriptor", refuse)
        for _ in range(SLOTS + 1):
            with pytest.raises(RingFull, match="no room"):
                GpuCall.of(make_inputs(FREE, 2)).submit(client, stream)
    assert enqueued(movers.opened[0], stream) == (0, 0)
    # All at a time, each with a slot.
    gate = stream.hold()
    calls = [GpuCall.of(make_inputs(FREE, tag)) for tag in range(SLOTS)]
    with within(SOON_S):
        futures = [call.submit(client, stream) for call in calls]
        gate.set()
        for call, future in zip(calls, futures, strict=True):
            future.wait(PATIENCE_S)
            call.check()
    assert_next_call_works(client, stream, n_reconnects=0)


def test_a_worker_that_ends_does_not_wait_for_a_call_that_it_was_not_told_of(
    client: moeshm.ExpertClient, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if all of it that is done was not taken."""
    released: list[Part] = []

    def refuse(part: Part, _call_id: int, _packed: bytes) -> None:
        released.append(part)
        raise RingFull("no room")

    with monkeypatch.context() as patch:
        patch.setattr(client._link, "describe", refuse)
        with pytest.raises(RingFull, match="no room"):
            GpuCall.of(make_inputs(FREE, 2)).submit(client, stream)
    (part,) = released
    memory = watch_of(client)._segment.memory
    done, taken = (load_word(memory, part.claim.flag(flag)) for flag in (DONE, TAKEN))
    assert done == taken == part.claim.sequence


def test_a_ring_that_is_broken(
    client: moeshm.ExpertClient, stream: Stream, movers: Movers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_descriptor: bytes, _deadline: float, _drain: Drain) -> int:
        raise ProtocolError("it makes no sense")

    monkeypatch.setattr(client._link._outbox, "write_descriptor", refuse)
    with pytest.raises(WorkerDied, match="it makes no sense"):
        GpuCall.of(make_inputs(FREE, 2)).submit(client, stream)
    assert enqueued(movers.opened[0], stream) == (0, 0)
    assert_let_go(movers.opened[0])
    assert_next_call_works(client, stream)


def test_a_session_that_ends_before_the_descriptor(
    client: moeshm.ExpertClient, stream: Stream, movers: Movers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the call has its room already."""
    link = client._link
    new_id = link.new_id

    def lose() -> int:
        link.lose(WorkerDied("all of a sudden"))
        return new_id()

    monkeypatch.setattr(link, "new_id", lose)
    with pytest.raises(WorkerDied, match="all of a sudden"):
        GpuCall.of(make_inputs(FREE, 2)).submit(client, stream)
    assert enqueued(movers.opened[0], stream) == (0, 0)
    assert_let_go(movers.opened[0])
    assert_next_call_works(client, stream)


@pytest.mark.parametrize("is_added", [None, False, True])
def test_an_interrupt_between_the_room_and_the_descriptor(
    client: moeshm.ExpertClient,
    stream: Stream,
    movers: Movers,
    monkeypatch: pytest.MonkeyPatch,
    is_added: bool | None,
) -> None:
    """Before there is a part of the call, or before or after that is looked after: the room is
    given back with the session, and nothing waits for it."""
    link = client._link
    assert link.device_calls is not None
    watch = link.device_calls._watch
    add = watch.add

    def interrupt(*parts: Part) -> int:
        if is_added:
            add(*parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(
        link if is_added is None else watch, "new_id" if is_added is None else "add", interrupt
    )
    with within(SOON_S):
        with pytest.raises(KeyboardInterrupt):
            GpuCall.of(make_inputs(FREE, 2)).submit(client, stream)
        assert link.loss is not None
        assert enqueued(movers.opened[0], stream) == (0, 0)
        assert_let_go(movers.opened[0])
    assert_next_call_works(client, stream)


# --- before the launch ------------------------------------------------------------------------


def test_a_worker_that_dies_before_the_launch(
    worker: GatedWorker,
    client: moeshm.ExpertClient,
    stream: Stream,
    movers: Movers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is launched then waits for nobody."""
    after_descriptor(client, monkeypatch, worker.process.kill)
    future = GpuCall.of(make_inputs(FREE, 2)).submit(client, stream)
    with within(SOON_S):
        with pytest.raises(WorkerDied):
            future.wait(PATIENCE_S)
        assert enqueued(movers.opened[0], stream) == (1, 1)
        assert_let_go(movers.opened[0])


def test_a_worker_that_dies_before_the_launch_is_stood_in_for(
    worker: GatedWorker,
    movers: Movers,
    kind: Kind,
    stream: Stream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fallback computes what that launch gives."""
    assert not movers.opened
    with connected(worker, kind, ArithmeticBackend()) as client:
        after_descriptor(client, monkeypatch, worker.process.kill)
        call = GpuCall.of(make_inputs(FREE, 2))
        future = call.submit(client, stream)
        with within(SOON_S):
            future.wait(PATIENCE_S)
        call.check()
        assert client.stats().fallbacks == {"worker_died": 1}


def test_a_worker_that_hangs_before_the_launch(
    worker: GatedWorker,
    client: moeshm.ExpertClient,
    stream: Stream,
    movers: Movers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    after_descriptor(client, monkeypatch, worker.process.stop)
    future = GpuCall.of(make_inputs(FREE, 2)).submit(client, stream, timeout_s=0.3)
    with within(SOON_S):
        with pytest.raises(DeadlineExceeded):
            future.wait(PATIENCE_S)
        assert enqueued(movers.opened[0], stream) == (1, 1)
        assert_let_go(movers.opened[0])
    worker.process.signal(signal.SIGCONT)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_between_the_descriptor_and_the_launch(
    client: moeshm.ExpertClient,
    stream: Stream,
    movers: Movers,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    """The worker waits for arrays that never come: the session is given up, and its slot is not
    another call's."""

    def interrupt() -> None:
        raise error

    after_descriptor(client, monkeypatch, interrupt)
    with pytest.raises(error):
        GpuCall.of(make_inputs(FREE, 2)).submit(client, stream)
    assert enqueued(movers.opened[0], stream) == (0, 0)
    assert_let_go(movers.opened[0])
    assert_next_call_works(client, stream)


@pytest.mark.parametrize(
    ("cause", "told"),
    [(ClientClosed("closed meanwhile"), ClientClosed), (WorkerDied("lost meanwhile"), WorkerDied)],
)
def test_a_session_that_ends_before_the_launch(
    worker: GatedWorker,
    client: moeshm.ExpertClient,
    stream: Stream,
    movers: Movers,
    monkeypatch: pytest.MonkeyPatch,
    cause: CallError,
    told: type[CallError],
) -> None:
    """By another thread."""
    link = client._link
    # Else it may compute the call all the same.
    worker.process.stop()

    def end() -> None:
        thread = threading.Thread(target=link.close, args=(cause,))
        thread.start()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()

    after_descriptor(client, monkeypatch, end)
    future = GpuCall.of(make_inputs(FREE, 2)).submit(client, stream)
    with within(SOON_S):
        with pytest.raises(told, match="meanwhile"):
            future.wait(PATIENCE_S)
        assert enqueued(movers.opened[0], stream) == (1, 1)
        assert_let_go(movers.opened[0])
    worker.process.signal(signal.SIGCONT)


# --- at the launch ----------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["exchange", "give", "take"])
@pytest.mark.parametrize("error", [DeviceError, KeyboardInterrupt])
def test_a_submit_that_is_cut_short(
    client: moeshm.ExpertClient,
    stream: Stream,
    movers: Movers,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: type[BaseException],
) -> None:
    """The caller hears of it, nothing waits for ever, and the next call has another session."""
    first = GpuCall.of(make_inputs(FREE, 1))
    first.submit(client, stream).wait(PATIENCE_S)

    def fail(*_arguments: object) -> None:
        raise error("not today")

    monkeypatch.setattr(movers.opened[0], step, fail)
    with pytest.raises(error):
        # More than one launch exchanges.
        GpuCall.of(make_inputs(FREE, 2, MORE_TOKENS)).submit(client, stream)
    assert enqueued(movers.opened[0], stream) == (1 + (step == "take"), 1)
    assert_let_go(movers.opened[0])
    assert_next_call_works(client, stream)


def test_a_launch_that_is_refused_leaves_earlier_calls_to_their_streams(
    client: moeshm.ExpertClient,
    stream: Stream,
    movers: Movers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They end with the session, and the slab is let go of when they have."""
    gate = stream.hold()
    earlier = GpuCall.of(make_inputs(FREE, 1)).submit(client, stream)

    def fail(*_arguments: object) -> None:
        raise DeviceError("not today")

    monkeypatch.setattr(movers.opened[0], "exchange", fail)
    with pytest.raises(DeviceError, match="not today"):
        GpuCall.of(make_inputs(FREE, 2)).submit(client, stream)
    # Else the worker could be faster.
    wait_until(lambda: earlier._parts[0].is_released)
    assert not movers.opened[0].is_closed
    gate.set()
    with within(SOON_S), pytest.raises(WorkerDied, match="not today"):
        earlier.wait(PATIENCE_S)
    assert_let_go(movers.opened[0])
    assert_next_call_works(client, stream)


@pytest.mark.parametrize("step", ["give", "take"])
def test_an_interrupt_right_after_the_launch(
    client: moeshm.ExpertClient,
    stream: Stream,
    movers: Movers,
    monkeypatch: pytest.MonkeyPatch,
    kind: Kind,
    step: str,
) -> None:
    """What was launched does not wait for ever, and its slab is not let go of before."""
    mover, watch = movers.opened[0], watch_of(client)
    exchanges = step == "give" and kind.most_exchanged >= 0
    launch = getattr(mover, "exchange" if exchanges else step)
    gates: list[threading.Event] = []

    def launch_and_fail(*arguments: Any) -> None:
        gates.append(stream.hold())
        launch(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(mover, "exchange" if exchanges else step, launch_and_fail)
    # More than one launch exchanges.
    call = GpuCall.of(make_inputs(FREE, 2, 3 if exchanges else MORE_TOKENS))
    with pytest.raises(KeyboardInterrupt):
        call.submit(client, stream)
    (part,) = watch.parts
    wait_until(lambda: part.has_reached(DONE) and part.has_reached(GIVEN) == (step == "take"))
    watch.settle()
    assert list(watch.parts) == [part]
    assert not mover.is_closed
    gates[0].set()
    with within(SOON_S):
        assert enqueued(mover, stream) == (1, int(exchanges or step == "take"))
        assert_let_go(mover)
    assert_next_call_works(client, stream)
