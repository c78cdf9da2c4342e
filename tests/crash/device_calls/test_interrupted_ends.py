"""An interrupt while a call's end is looked after, at every moment of that: whoever waits next
hears the same of it, and no room is lost."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator

import pytest

import moeshm
from moeshm import device_future, device_watch
from moeshm.device_future import DeviceFuture, Part
from moeshm.device_watch import Watch
from moeshm.errors import CallError, InvalidCall, NotReady, WorkerFailed
from moeshm.transport.slab import SLOTS
from tests.crash.arithmetic import FREE, make_inputs
from tests.crash.device_calls.calls import (
    SOON_S,
    GpuCall,
    assert_same_session,
    wait_until,
    watch_of,
)
from tests.crash.processes import within
from tests.engine_gpu import PATIENCE_S, Stream
from tests.interrupts import interrupted_at

FILES = device_future.__file__, device_watch.__file__
#: Fewer moments than any of these ends has.
FEWEST_MOMENTS = 10


@pytest.fixture
def watch(client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Whose own thread looks after nothing."""
    found = watch_of(client)
    monkeypatch.setattr(found, "_look", lambda: None)
    return found


def at_every_moment(submit: Callable[[], list[DeviceFuture]]) -> Iterator[list[DeviceFuture]]:
    """Calls that are over, the `wait` of the first of which was interrupted; each time later."""
    for moment in itertools.count():
        futures = submit()
        try:
            with interrupted_at(moment, FILES), contextlib.suppress(CallError):
                futures[0].wait(PATIENCE_S)
        except KeyboardInterrupt:
            yield futures
        else:
            assert moment > FEWEST_MOMENTS
            return


def refused(client: moeshm.ExpertClient, stream: Stream, n_calls: int) -> list[DeviceFuture]:
    """Calls that the stream has passed, of a view that the worker does not hold."""
    numbers = client._link.views
    held = numbers.of(client.view)
    numbers._numbers[client.view] = 77
    futures = [GpuCall.of(make_inputs(FREE, tag)).submit(client, stream) for tag in range(n_calls)]
    numbers._numbers[client.view] = held
    stream.synchronize()
    return futures


def test_of_several_refused_calls_another_thread_tells(
    client: moeshm.ExpertClient, stream: Stream, watch: Watch
) -> None:
    """None of them passes for one with a result."""
    for futures in at_every_moment(lambda: refused(client, stream, 3)):
        thread = threading.Thread(target=watch.settle)
        thread.start()
        thread.join(PATIENCE_S)
        assert not watch.parts
        for future in futures:
            with pytest.raises(InvalidCall, match="view 77 is not held"):
                future.wait(0.0)
    assert_same_session(client, stream)


def test_whoever_was_interrupted_may_wait_again(
    client: moeshm.ExpertClient, stream: Stream, watch: Watch
) -> None:
    for futures in at_every_moment(lambda: refused(client, stream, 3)):
        for future in futures:
            with within(SOON_S), pytest.raises(InvalidCall, match="view 77 is not held"):
                future.wait(PATIENCE_S)
        # Its future knew of one that was interrupted last.
        watch.settle()
        assert not watch.parts
    assert_same_session(client, stream)


@pytest.mark.usefixtures("watch")
def test_no_slot_is_lost(client: moeshm.ExpertClient, stream: Stream) -> None:
    """All can be in use at a time, afterwards as before."""

    def passed() -> list[DeviceFuture]:
        future = GpuCall.of(make_inputs(FREE, 1)).submit(client, stream)
        stream.synchronize()
        return [future]

    for futures in at_every_moment(passed):
        futures[0].wait(PATIENCE_S)
    gate = stream.hold()
    calls = [GpuCall.of(make_inputs(FREE, tag)) for tag in range(SLOTS)]
    with within(SOON_S):
        pending = [call.submit(client, stream, timeout_s=SOON_S / 2) for call in calls]
        gate.set()
        for call, future in zip(calls, pending, strict=True):
            future.wait(PATIENCE_S)
            call.check()


def test_a_wait_ends_though_another_thread_is_slow_to_tell(
    client: moeshm.ExpertClient, stream: Stream, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_there, gate, reason = threading.Event(), threading.Event(), watch._reason

    def reason_late(part: Part, flag: int) -> CallError:
        is_there.set()
        gate.wait(PATIENCE_S)
        return reason(part, flag)

    monkeypatch.setattr(watch, "_reason", reason_late)
    (future,) = refused(client, stream, 1)
    thread = threading.Thread(target=watch.settle)
    thread.start()
    assert is_there.wait(PATIENCE_S)
    with within(SOON_S), pytest.raises(NotReady, match=r"within 0\.05 s"):
        future.wait(0.05)
    gate.set()
    with pytest.raises(InvalidCall, match="view 77 is not held"):
        future.wait(PATIENCE_S)
    thread.join(PATIENCE_S)
    wait_until(lambda: not watch.parts)


def test_a_reason_that_cannot_be_found_is_told_as_that(
    client: moeshm.ExpertClient, stream: Stream, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call has no result, and its room is free."""

    reason = watch._reason

    def fail(part: Part, flag: int) -> CallError:
        reason(part, flag)
        raise ZeroDivisionError("by top_k")

    with monkeypatch.context() as patch:
        patch.setattr(watch, "_reason", fail)
        (future,) = refused(client, stream, 1)
        # The main thread would take it for what a signal's handler raised.
        thread = threading.Thread(target=watch.settle)
        thread.start()
        thread.join(PATIENCE_S)
        with pytest.raises(WorkerFailed, match="why is unknown: by top_k"):
            future.wait(PATIENCE_S)
    assert not watch.parts
    assert_same_session(client, stream)


def test_what_a_handler_raises_is_its_callers(
    client: moeshm.ExpertClient, stream: Stream, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not taken for what is wrong with the call."""

    def give_up(_part: Part) -> None:
        raise TimeoutError("as the test says")

    with monkeypatch.context() as patch:
        patch.setattr(watch, "_take_in_reply", give_up)
        (future,) = refused(client, stream, 1)
        with pytest.raises(TimeoutError, match="as the test says"):
            future.wait(PATIENCE_S)
    with within(SOON_S), pytest.raises(InvalidCall, match="view 77 is not held"):
        future.wait(PATIENCE_S)
    assert_same_session(client, stream)
