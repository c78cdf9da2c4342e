"""What becomes of calls of a GPU's arrays when their worker dies, hangs or ends: no stream waits
for ever."""

from __future__ import annotations

import contextlib
import select
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

import moeshm
from moeshm.errors import DeadlineExceeded, NotReady, WorkerDied, WorkerFailed
from moeshm.transport.slab import DONE
from tests.crash.arithmetic import FREE, GATED, ArithmeticBackend, make_inputs
from tests.crash.device_calls.calls import SOON_S, GpuCall, Kind, connected, wait_until
from tests.crash.processes import GatedWorker, gated_worker, within
from tests.engine_gpu import PATIENCE_S, Movers, Stream


def test_a_worker_that_is_killed(
    worker: GatedWorker, client: moeshm.ExpertClient, stream: Stream, movers: Movers
) -> None:
    calls = [GpuCall.of(make_inputs(GATED, tag)) for tag in range(3)]
    futures = [call.submit(client, stream) for call in calls]
    worker.next_turn()
    worker.process.kill()
    with within(SOON_S):
        for future in futures:
            with pytest.raises(WorkerDied, match="session with the worker is over"):
                future.wait(PATIENCE_S)
        stream.synchronize()
    client.close()
    assert [mover.is_closed for mover in movers.opened] == [True]


def test_arrays_that_come_after_the_death(
    worker: GatedWorker, client: moeshm.ExpertClient, stream: Stream
) -> None:
    held = stream.hold()
    future = GpuCall.of(make_inputs(FREE, 1)).submit(client, stream)
    worker.process.kill()
    with within(SOON_S), pytest.raises(NotReady):
        future.wait(0.2)
    held.set()
    with within(SOON_S), pytest.raises(WorkerDied):
        future.wait(PATIENCE_S)
    stream.synchronize()


def test_calls_fall_back_exactly(
    worker: GatedWorker, movers: Movers, kind: Kind, stream: Stream
) -> None:
    """The stream finds what the fallback computed, and nobody raises."""
    assert not movers.opened
    with connected(worker, kind, ArithmeticBackend()) as client:
        calls = [GpuCall.of(make_inputs(GATED, tag, tag + 1)) for tag in range(4)]
        held = [call.submit(client, stream) for call in calls[:3]]
        gate = stream.hold()
        held.append(calls[3].submit(client, stream))
        worker.next_turn()
        worker.process.kill()
        gate.set()
        with within(SOON_S):
            for call, future in zip(calls, held, strict=True):
                future.wait(PATIENCE_S)
                call.check()
        assert client.stats().fallbacks == {"worker_died": 4}


class BrokenFallback(ArithmeticBackend):
    """Raises what no backend should."""

    def ffn(self, *_arguments: object) -> None:
        raise ZeroDivisionError("no luck here either")


def test_a_fallback_that_raises(
    worker: GatedWorker, movers: Movers, kind: Kind, stream: Stream
) -> None:
    assert not movers.opened
    with connected(worker, kind, BrokenFallback()) as client:
        futures = [GpuCall.of(make_inputs(GATED, tag)).submit(client, stream) for tag in range(3)]
        worker.next_turn()
        worker.process.kill()
        for future in futures:
            with within(SOON_S), pytest.raises(WorkerDied, match="no luck here either"):
                future.wait(PATIENCE_S)
        stream.synchronize()


def test_a_worker_that_hangs(
    worker: GatedWorker, client: moeshm.ExpertClient, stream: Stream
) -> None:
    call = GpuCall.of(make_inputs(FREE, 1))
    worker.process.stop()
    future = call.submit(client, stream, timeout_s=0.3)
    with within(SOON_S), pytest.raises(DeadlineExceeded, match=r"no answer within 0\.3 s"):
        future.wait(PATIENCE_S)
    stream.synchronize()
    worker.process.signal(signal.SIGCONT)


def test_what_was_given_in_time_is_given_up_at_its_deadline(
    worker: GatedWorker,
    client: moeshm.ExpertClient,
    stream: Stream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also behind a call that has more time: the grace is for what the worker gets late."""
    monkeypatch.setattr("moeshm.device_watch._LATE_GRACE_S", 1e6)
    worker.process.stop()
    patient = GpuCall.of(make_inputs(FREE, 1)).submit(client, stream, timeout_s=0.6)
    other = Stream()
    hasty = GpuCall.of(make_inputs(FREE, 2)).submit(client, other, timeout_s=0.3)
    for future, match in (
        (hasty, r"no answer within 0\.3 s"),
        (patient, r"within 0\.6 s.*given up"),
    ):
        with within(SOON_S), pytest.raises(DeadlineExceeded, match=match):
            future.wait(PATIENCE_S)
    stream.synchronize()
    other.close()
    worker.process.signal(signal.SIGCONT)


def test_a_lost_worker_is_found_again(
    tmp_path: Path, movers: Movers, stream: Stream, kind: Kind
) -> None:
    with contextlib.ExitStack() as stack:
        with gated_worker(tmp_path, has_gpu=kind.has_gpu) as worker:
            client = stack.enter_context(connected(worker, kind))
            future = GpuCall.of(make_inputs(GATED, 1)).submit(client, stream)
            worker.next_turn()
            worker.process.kill()
            with pytest.raises(WorkerDied):
                future.wait(PATIENCE_S)
        stack.enter_context(gated_worker(tmp_path, has_gpu=kind.has_gpu))
        # Closed before that worker ends.
        stack.callback(client.close)
        call = GpuCall.of(make_inputs(FREE, 2))
        call.submit(client, stream).wait(PATIENCE_S)
        call.check()
        assert client.slab == kind.slab
        assert len(movers.opened) == 2


def test_a_worker_that_is_told_to_end_waits_for_the_output_to_be_taken(
    worker: GatedWorker,
    client: moeshm.ExpertClient,
    stream: Stream,
    movers: Movers,
    kind: Kind,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its device memory is not freed under the engine's GPU."""
    call = GpuCall.of(make_inputs(FREE, 1))
    gate, take = threading.Event(), movers.opened[0]._take

    def take_late(*arguments: Any) -> None:
        gate.wait(PATIENCE_S)
        take(*arguments)

    monkeypatch.setattr(movers.opened[0], "_take", take_late)
    future = call.submit(client, stream)
    part = future._parts[0]
    wait_until(lambda: part.has_reached(DONE))
    worker.process.signal(signal.SIGTERM)
    # Its goodbye.
    control = client._link.session.control.fileno()
    assert select.select([control], [], [], PATIENCE_S)[0]
    if kind.slab == "device":
        with pytest.raises(subprocess.TimeoutExpired):
            worker.process.wait(0.5)
    gate.set()
    future.wait(PATIENCE_S)
    call.check()
    assert worker.process.wait() == 0


def test_arrays_that_never_come_do_not_hold_up_a_shutdown(tmp_path: Path, movers: Movers) -> None:
    assert not movers.opened
    stream = Stream()
    with gated_worker(tmp_path, drain_limit_s=0.5) as worker:
        client = moeshm.connect(worker.address, engine_device="cuda:0")
        held = stream.hold()
        futures = [GpuCall.of(make_inputs(FREE, tag)).submit(client, stream) for tag in range(8)]
        worker.process.signal(signal.SIGTERM)
        with within(SOON_S):
            assert worker.process.wait() == 0
        held.set()
        for future in futures:
            with pytest.raises((WorkerDied, WorkerFailed)):
                future.wait(PATIENCE_S)
        client.close()
    stream.close()
