"""A call of a GPU's arrays whose deadline passes while the worker is at an earlier one of the same
session: it ends alone, and its room is nobody's before the worker has passed it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import moeshm
from moeshm import device_watch
from moeshm._words import load_word
from moeshm.device_future import Part
from moeshm.errors import DeadlineExceeded, RingFull, WorkerDied
from moeshm.transport.slab import DONE, SLOTS, TAKEN
from tests.crash.arithmetic import FREE, GATED, ArithmeticBackend, make_inputs
from tests.crash.device_calls.calls import (
    SOON_S,
    GpuCall,
    Kind,
    assert_same_session,
    connected,
    unlike_kinds,
    wait_until,
    watch_of,
)
from tests.crash.processes import GatedWorker, within
from tests.engine_gpu import PATIENCE_S, Movers, Stream

HASTY_S = 0.3
pytestmark = unlike_kinds


@pytest.fixture
def other() -> Iterator[Stream]:
    """For what does not wait for the first stream's calls."""
    made = Stream()
    yield made
    made.close()


def end_alone(future: moeshm.DeviceFuture) -> None:
    """It fails by itself, in time."""
    with within(SOON_S), pytest.raises(DeadlineExceeded, match="which has earlier calls"):
        future.wait(PATIENCE_S)


def be_late_behind(
    client: moeshm.ExpertClient,
    worker: GatedWorker,
    stream: Stream,
    other: Stream,
    layer: int = FREE,
) -> tuple[GpuCall, moeshm.DeviceFuture, Part]:
    """A call that the worker is at, and the part of one behind it that ended alone."""
    first = GpuCall.of(make_inputs(GATED, 1))
    pending = first.submit(client, stream)
    assert worker.next_turn() == (GATED, 1)
    hasty = GpuCall.of(make_inputs(layer, 2)).submit(client, other, timeout_s=HASTY_S)
    part = hasty._parts[0]
    end_alone(hasty)
    other.synchronize()
    assert not pending.done()
    assert client._link.loss is None
    return first, pending, part


def test_it_ends_alone(
    worker: GatedWorker, client: moeshm.ExpertClient, stream: Stream, other: Stream
) -> None:
    """And the earlier call's result comes, as does that of one behind it."""
    first, pending, _ = be_late_behind(client, worker, stream, other)
    last = GpuCall.of(make_inputs(FREE, 3))
    later = last.submit(client, other)
    worker.let_go()
    with within(SOON_S):
        pending.wait(PATIENCE_S)
        later.wait(PATIENCE_S)
    first.check()
    last.check()
    assert_same_session(client, stream)


def test_its_room_is_its_own_until_the_worker_has_passed_it(
    worker: GatedWorker,
    client: moeshm.ExpertClient,
    stream: Stream,
    other: Stream,
    kind: Kind,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device is at it when the earlier call is over; a host is still at that."""
    monkeypatch.setattr(device_watch, "_LATE_GRACE_S", 1e6)
    layer, n_before = (GATED, 1) if kind.has_gpu else (FREE, 2)
    first, pending, part = be_late_behind(client, worker, stream, other, layer)
    watch = watch_of(client)
    if kind.has_gpu:
        worker.let_go()
        pending.wait(PATIENCE_S)
        assert worker.next_turn() == (GATED, 2)
    calls = [GpuCall.of(make_inputs(FREE, tag)) for tag in range(SLOTS - n_before)]
    futures = [call.submit(client, other) for call in calls]
    with pytest.raises(RingFull, match="full of earlier calls"):
        GpuCall.of(make_inputs(FREE, 3)).submit(client, other, timeout_s=0.1)
    assert watch.parts[n_before - 1] is part
    worker.let_go()
    with within(SOON_S):
        for call, future in zip([first, *calls], [pending, *futures], strict=True):
            future.wait(PATIENCE_S)
            call.check()
    assert part.is_passed
    assert_same_session(client, stream)


def test_a_worker_that_ends_does_not_wait_for_it(
    worker: GatedWorker, client: moeshm.ExpertClient, stream: Stream, other: Stream
) -> None:
    """As if all of it that is done was not taken."""
    _, pending, part = be_late_behind(client, worker, stream, other)
    memory = watch_of(client)._segment.memory
    done, taken = (load_word(memory, part.claim.flag(flag)) for flag in (DONE, TAKEN))
    assert done == taken == part.claim.sequence + 1
    worker.let_go()
    pending.wait(PATIENCE_S)


def test_nobody_looks_more_often_because_of_it(
    worker: GatedWorker, client: moeshm.ExpertClient, stream: Stream, other: Stream
) -> None:
    _, pending, _ = be_late_behind(client, worker, stream, other)
    assert watch_of(client)._pause_s() == device_watch._SLICE_S
    worker.let_go()
    pending.wait(PATIENCE_S)


def test_behind_a_call_of_host_arrays(
    worker: GatedWorker, client: moeshm.ExpertClient, stream: Stream
) -> None:
    inputs = make_inputs(GATED, 1)
    pending = client.submit(*inputs)
    assert worker.next_turn() == (GATED, 1)
    end_alone(GpuCall.of(make_inputs(FREE, 2)).submit(client, stream, timeout_s=HASTY_S))
    worker.let_go()
    pending.result(PATIENCE_S)
    assert_same_session(client, stream)


def test_a_call_that_the_worker_has_passed_is_none_before_it(
    worker: GatedWorker,
    client: moeshm.ExpertClient,
    stream: Stream,
    movers: Movers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though its output was not taken, a worker that hangs afterwards is given up."""
    gate, take = threading.Event(), movers.opened[0]._take

    def take_late(*arguments: Any) -> None:
        gate.wait(PATIENCE_S)
        take(*arguments)

    monkeypatch.setattr(movers.opened[0], "_take", take_late)
    pending = GpuCall.of(make_inputs(FREE, 1)).submit(client, stream)
    part = pending._parts[0]
    assert part.is_in_turn or part.is_passed
    wait_until(lambda: part.is_passed)
    assert not part.is_in_turn
    late = client.submit(*make_inputs(GATED, 2), timeout_s=HASTY_S)
    with within(SOON_S), pytest.raises(DeadlineExceeded, match="the session is given up"):
        late.result()
    gate.set()
    stream.synchronize()
    worker.let_go()


# --- workers that hang, die or end ------------------------------------------------------------


def test_each_that_is_late_ends_alone_while_the_first_has_time(
    worker: GatedWorker, client: moeshm.ExpertClient, stream: Stream, other: Stream
) -> None:
    """Though the worker does nothing. Should it go on, what it refuses then is no news."""
    worker.process.stop()
    first = GpuCall.of(make_inputs(FREE, 1))
    pending = first.submit(client, stream)
    for tag in (2, 3):
        end_alone(GpuCall.of(make_inputs(FREE, tag)).submit(client, other, timeout_s=HASTY_S))
    assert client._link.loss is None
    worker.process.signal(signal.SIGCONT)
    with within(SOON_S):
        pending.wait(PATIENCE_S)
    first.check()
    assert_same_session(client, stream)


def test_the_first_ones_own_deadline_ends_the_session(
    worker: GatedWorker, client: moeshm.ExpertClient, stream: Stream, other: Stream, movers: Movers
) -> None:
    worker.process.stop()
    pending = GpuCall.of(make_inputs(FREE, 1)).submit(client, stream, timeout_s=1.0)
    hasty = GpuCall.of(make_inputs(FREE, 2)).submit(client, other, timeout_s=HASTY_S)
    end_alone(hasty)
    assert client._link.loss is None
    with within(SOON_S), pytest.raises(DeadlineExceeded, match="the session is given up"):
        pending.wait(PATIENCE_S)
    with within(SOON_S):
        wait_until(lambda: movers.opened[0].is_closed)
    worker.process.signal(signal.SIGCONT)
    call = GpuCall.of(make_inputs(FREE, 3))
    call.submit(client, stream).wait(PATIENCE_S)
    call.check()
    assert client.stats().reconnects == 1


def test_a_worker_that_hangs_when_it_comes_to_it(
    worker: GatedWorker,
    client: moeshm.ExpertClient,
    stream: Stream,
    other: Stream,
    movers: Movers,
    kind: Kind,
) -> None:
    """A device that was given it in time computes it; a host refuses it, and cannot hang there."""
    _, pending, _ = be_late_behind(client, worker, stream, other, layer=GATED)
    last = GpuCall.of(make_inputs(FREE, 3))
    later = last.submit(client, other)
    worker.let_go()
    pending.wait(PATIENCE_S)
    if kind.has_gpu:
        with within(SOON_S), pytest.raises(WorkerDied, match="the session is given up"):
            later.wait(PATIENCE_S)
        wait_until(lambda: movers.opened[0].is_closed)
        worker.let_go()
    else:
        later.wait(PATIENCE_S)
        last.check()
        assert_same_session(client, stream)


def test_a_worker_that_is_killed_before_it_comes_to_it(
    worker: GatedWorker, client: moeshm.ExpertClient, stream: Stream, other: Stream, movers: Movers
) -> None:
    """Also if nobody waits for any other call."""
    _, pending, _ = be_late_behind(client, worker, stream, other)
    worker.process.kill()
    with within(SOON_S):
        with pytest.raises(WorkerDied):
            pending.wait(PATIENCE_S)
        wait_until(lambda: movers.opened[0].is_closed)
    assert client._link._pending == {}


def test_a_client_that_closes_before_the_worker_comes_to_it(
    worker: GatedWorker, client: moeshm.ExpertClient, stream: Stream, other: Stream, movers: Movers
) -> None:
    be_late_behind(client, worker, stream, other)
    watch = watch_of(client)
    with within(SOON_S):
        client.close()
    assert movers.opened[0].is_closed
    assert not watch.parts
    worker.let_go()


def test_with_a_fallback_the_session_ends(
    worker: GatedWorker, movers: Movers, kind: Kind, stream: Stream, other: Stream
) -> None:
    """The fallback computes all that was on its way: where the stream takes an output from, no
    worker of a session that lives may write later."""
    assert not movers.opened
    with connected(worker, kind, ArithmeticBackend()) as client:
        first, second = (GpuCall.of(make_inputs(layer, 1)) for layer in (GATED, FREE))
        pending = first.submit(client, stream)
        worker.next_turn()
        hasty = second.submit(client, other, timeout_s=HASTY_S)
        with within(SOON_S):
            for call, future in ((second, hasty), (first, pending)):
                future.wait(PATIENCE_S)
                call.check()
        assert client._link.loss is not None
        assert client.stats().fallbacks == {"deadline": 1, "worker_died": 1}
        worker.let_go()
