"""Calls whose arrays are on the engine's GPU: results, order, and what becomes of them when a
worker fails, dies or hangs. No stream waits for ever."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import moeshm
from moeshm import device_watch, engine_device
from moeshm.demo import tiny_moe_path
from moeshm.errors import (
    ClientClosed,
    DeadlineExceeded,
    DeviceError,
    ForkedProcess,
    InvalidCall,
    NotReady,
    SettingError,
    WorkerDied,
    WorkerFailed,
)
from moeshm.transport.slab import DONE, SLOTS
from tests.crash.arithmetic import (
    BROKEN,
    FREE,
    GATED,
    HIDDEN_SIZE,
    MANY_TOKENS,
    TOP_K,
    WIDE,
    ArithmeticBackend,
    CallInputs,
    assert_exact,
    make_inputs,
)
from tests.crash.processes import GatedWorker, gated_worker, mapped_rings, open_fds, within
from tests.crash.slab_arithmetic import SlabArithmetic
from tests.engine_gpu import PATIENCE_S, GpuArray, Movers, Stream

SOON_S = 15.0


class Kind(NamedTuple):
    """How a worker serves slabs, and what a client asks for and gets."""

    has_gpu: bool
    transport: str
    slab: str


KINDS = {
    "pinned, by the host": Kind(False, "auto", "pinned"),
    "pinned": Kind(True, "shared", "pinned"),
    "device": Kind(True, "auto", "device"),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each way."""
    return KINDS[request.param]


@pytest.fixture(scope="module")
def lasting_worker(tmp_path_factory: pytest.TempPathFactory, kind: Kind) -> Iterator[GatedWorker]:
    """For tests that leave it as it was; its events are read by nobody."""
    with gated_worker(tmp_path_factory.mktemp("lasting"), has_gpu=kind.has_gpu) as started:
        yield started


@pytest.fixture
def worker(tmp_path: Path, kind: Kind) -> Iterator[GatedWorker]:
    """For tests that end, stop or gate it."""
    with gated_worker(tmp_path, has_gpu=kind.has_gpu) as started:
        yield started


@pytest.fixture
def movers(monkeypatch: pytest.MonkeyPatch) -> Movers:
    """What is opened."""
    made = Movers()
    monkeypatch.setattr(engine_device, "open_mover", made.open)
    return made


@pytest.fixture
def stream() -> Iterator[Stream]:
    """One that must have passed everything at the end."""
    made = Stream()
    yield made
    made.close()


@contextlib.contextmanager
def connected(
    worker: GatedWorker, kind: Kind, fallback: ArithmeticBackend | None = None
) -> Iterator[moeshm.ExpertClient]:
    """A client with a GPU."""
    transport = kind.transport
    if fallback is not None and kind.slab == "device":
        # By itself a client with a fallback asks for pinned ones.
        transport = "device"
    with moeshm.connect(
        worker.address, transport=transport, engine_device="cuda:0", fallback=fallback
    ) as client:
        assert client.slab == kind.slab
        yield client


@pytest.fixture
def client(
    request: pytest.FixtureRequest, lasting_worker: GatedWorker, movers: Movers, kind: Kind
) -> Iterator[moeshm.ExpertClient]:
    """Of the test's own worker, or of the lasting one; without a fallback."""
    assert not movers.opened
    has_own = "worker" in request.fixturenames
    own: GatedWorker = request.getfixturevalue("worker") if has_own else lasting_worker
    with connected(own, kind) as made:
        yield made


def wait_until(is_so: Callable[[], bool]) -> None:
    """Until a thread of this process has got there."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class GpuCall(NamedTuple):
    """A call's arrays on the GPU, and its output."""

    inputs: CallInputs
    arrays: tuple[GpuArray, GpuArray, GpuArray]
    out: GpuArray

    @classmethod
    def of(cls, inputs: CallInputs) -> GpuCall:
        """Copies, and an output that was never written."""
        hidden, ids, weights = (GpuArray(each.copy()) for each in inputs[1:])
        return cls(inputs, (hidden, ids, weights), GpuArray(np.full_like(inputs[1], np.nan)))

    def submit(
        self,
        client: moeshm.ExpertClient,
        stream: Stream,
        timeout_s: float | None = None,
        slice_tokens: int | None = None,
    ) -> moeshm.DeviceFuture:
        """On the stream."""
        future: moeshm.DeviceFuture = client.submit(
            self.inputs.layer, *self.arrays, out=self.out, timeout_s=timeout_s,
            slice_tokens=slice_tokens, stream=stream,
        )  # fmt: skip
        return future

    def check(self) -> None:
        """Its output, where the stream has passed it."""
        assert_exact(self.out.host, self.inputs)


def test_results(client: moeshm.ExpertClient, stream: Stream) -> None:
    calls = [GpuCall.of(make_inputs(FREE, tag, n_tokens=tag + 1)) for tag in range(8)]
    futures = [call.submit(client, stream) for call in calls]
    for call, future in zip(calls, futures, strict=True):
        assert future.wait(PATIENCE_S) is call.out
        assert future.done()
        call.check()
    stats = client.stats()
    assert (stats.calls, stats.rows) == (8, 36)
    assert stats.bytes_in == 36 * HIDDEN_SIZE * 4


def test_the_host_waits_for_nothing(client: moeshm.ExpertClient, stream: Stream) -> None:
    """Neither for the call's own stream, nor for the worker; what comes later on the stream finds
    the result."""
    call, seen = GpuCall.of(make_inputs(FREE, 1)), []
    held = stream.hold()
    # What fills the arrays comes late, too.
    stream.do(lambda: call.arrays[0].host.__imul__(2))
    future = call.submit(client, stream)
    assert future.result() is call.out
    stream.do(lambda: seen.append(call.out.host.copy()))
    assert not future.done()
    with pytest.raises(NotReady, match="still on its way"):
        future.wait(0.05)
    held.set()
    stream.synchronize()
    doubled = call.inputs._replace(hidden_states=call.inputs.hidden_states * 2)
    assert_exact(seen[0], doubled)


def test_compute_waits(client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Stream()
    monkeypatch.setattr("moeshm.device_arrays._current_stream", lambda _array: made.ptr)
    call = GpuCall.of(make_inputs(FREE, 3))
    assert client.compute(FREE, *call.arrays, out=call.out) is call.out
    call.check()
    made.close()


def test_formats_and_wide_ids(client: moeshm.ExpertClient, stream: Stream) -> None:
    inputs = make_inputs(FREE, 5, n_tokens=9)
    ids = inputs.topk_ids.astype(np.int64)
    ids[2, 1] = -1
    call = GpuCall.of(inputs)._replace(
        inputs=inputs._replace(topk_ids=ids.astype(np.int32)),
        arrays=(
            GpuArray(inputs.hidden_states),
            GpuArray(ids),
            GpuArray(inputs.topk_weights.astype(np.float16)),
        ),
    )
    call.submit(client, stream).wait(PATIENCE_S)
    call.check()
    half = GpuArray(inputs.hidden_states.astype(np.float16))
    out = GpuArray(np.zeros_like(half.host))
    client.submit(FREE, half, *call.arrays[1:], out=out, stream=stream).wait(PATIENCE_S)
    assert out.host.dtype == np.float16
    assert_exact(out.host.astype(np.float32), call.inputs)


def test_no_tokens(client: moeshm.ExpertClient, stream: Stream) -> None:
    call = GpuCall.of(make_inputs(FREE, 0, n_tokens=1))
    empty = GpuArray(call.inputs.hidden_states[:0])
    ids, weights = (GpuArray(each.host[:0]) for each in call.arrays[1:])
    future = client.submit(FREE, empty, ids, weights, out=GpuArray(empty.host), stream=stream)
    assert future.done()
    future.wait(0.0)


def test_slices_and_long_calls(client: moeshm.ExpertClient, stream: Stream) -> None:
    """In more parts than there are slots."""
    call = GpuCall.of(make_inputs(FREE, 7, n_tokens=3 * SLOTS + 1))
    call.submit(client, stream, slice_tokens=2).wait(PATIENCE_S)
    call.check()
    long = GpuCall.of(make_inputs(FREE, 7, n_tokens=3000))
    long.submit(client, stream).wait(PATIENCE_S)
    long.check()


def test_a_full_slab_waits_for_room(client: moeshm.ExpertClient, stream: Stream) -> None:
    calls = [GpuCall.of(make_inputs(WIDE, tag, MANY_TOKENS)) for tag in range(8)]
    for call in calls:
        call.submit(client, stream)
    stream.synchronize()
    for call in calls:
        call.check()


def test_a_new_session_is_part_of_the_time_that_a_call_has(
    client: moeshm.ExpertClient, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines, live_link = [], client._live_link

    def note(deadline: float, can_fall_back: bool = True) -> Any:
        deadlines.append(deadline)
        return live_link(deadline, can_fall_back)

    monkeypatch.setattr(client, "_live_link", note)
    future = GpuCall.of(make_inputs(FREE, 1)).submit(client, stream)
    assert deadlines == [future.deadline]
    future.wait(PATIENCE_S)


def test_several_streams(client: moeshm.ExpertClient, stream: Stream) -> None:
    """Calls begin in the order of their submits: one that is held holds the next."""
    other = Stream()
    held = stream.hold()
    first, second = (GpuCall.of(make_inputs(FREE, tag)) for tag in (1, 2))
    pending = first.submit(client, stream)
    later = second.submit(client, other)
    with pytest.raises(NotReady):
        later.wait(0.1)
    held.set()
    pending.wait(PATIENCE_S)
    later.wait(PATIENCE_S)
    first.check()
    second.check()
    other.close()


def test_calls_of_host_and_device_arrays_mix(client: moeshm.ExpertClient, stream: Stream) -> None:
    call, inputs = GpuCall.of(make_inputs(FREE, 1)), make_inputs(FREE, 2)
    future = call.submit(client, stream)
    assert_exact(client.compute(*inputs), inputs)
    future.wait(PATIENCE_S)
    call.check()


def test_wrong_ids_are_told_and_the_next_call_works(
    client: moeshm.ExpertClient, stream: Stream
) -> None:
    inputs = make_inputs(FREE, 1)
    inputs.topk_ids[1, 0] = 99
    future = GpuCall.of(inputs).submit(client, stream)
    with pytest.raises(InvalidCall, match=r"99|\[1, 0\]"):
        future.wait(PATIENCE_S)
    stream.synchronize()
    call = GpuCall.of(make_inputs(FREE, 2))
    call.submit(client, stream).wait(PATIENCE_S)
    call.check()


def test_a_backend_that_fails(client: moeshm.ExpertClient, stream: Stream, kind: Kind) -> None:
    future = GpuCall.of(make_inputs(BROKEN, 4)).submit(client, stream)
    if not kind.has_gpu:
        with pytest.raises(WorkerFailed, match="no luck with call 4"):
            future.wait(PATIENCE_S)
    stream.synchronize()


def test_a_released_view(client: moeshm.ExpertClient, stream: Stream) -> None:
    """What a worker refuses before it begins is an error of that call."""
    call = GpuCall.of(make_inputs(FREE, 1))
    link = client._link
    link.views.of(client.view)
    link.views._numbers[client.view] = 77
    future = call.submit(client, stream)
    with pytest.raises(InvalidCall, match="view 77 is not held"):
        future.wait(PATIENCE_S)
    stream.synchronize()


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


def test_a_stream_that_is_late(client: moeshm.ExpertClient, stream: Stream) -> None:
    """The worker gives the call up, and its session lives."""
    held = stream.hold()
    future = GpuCall.of(make_inputs(FREE, 1)).submit(client, stream, timeout_s=0.1)
    with pytest.raises(NotReady):
        future.wait(0.5)
    held.set()
    with pytest.raises(DeadlineExceeded, match="deadline passed"):
        future.wait(PATIENCE_S)
    call = GpuCall.of(make_inputs(FREE, 2))
    call.submit(client, stream).wait(PATIENCE_S)
    call.check()
    assert client.stats().reconnects == 0


def test_a_client_that_closes(
    worker: GatedWorker, client: moeshm.ExpertClient, stream: Stream, movers: Movers
) -> None:
    future = GpuCall.of(make_inputs(GATED, 1)).submit(client, stream)
    worker.next_turn()
    with within(SOON_S):
        client.close()
    with pytest.raises(ClientClosed):
        future.wait(PATIENCE_S)
    stream.synchronize()
    assert movers.opened[0].is_closed
    worker.let_go()


def test_a_client_that_is_forgotten(
    worker: GatedWorker, movers: Movers, kind: Kind, stream: Stream
) -> None:
    """What is on its way is finished, and then the slab is let go of."""
    client = moeshm.connect(worker.address, transport=kind.transport, engine_device="cuda:0")
    call = GpuCall.of(make_inputs(FREE, 1))
    held = stream.hold()
    future = call.submit(client, stream)
    watch = future._parts[0].watch
    del client
    held.set()
    future.wait(PATIENCE_S)
    call.check()
    del future
    watch.join(PATIENCE_S)
    assert movers.opened[0].is_closed


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


def test_nothing_is_left(worker: GatedWorker, movers: Movers, kind: Kind, stream: Stream) -> None:
    before, fds = mapped_rings(worker.process.pid), open_fds(worker.process.pid)
    for tag in range(3):
        with connected(worker, kind) as client:
            call = GpuCall.of(make_inputs(FREE, tag))
            call.submit(client, stream).wait(PATIENCE_S)
        worker.process.log.read_until("session ended after 1 calls, 3 rows")
    assert mapped_rings(worker.process.pid) == before
    assert open_fds(worker.process.pid) == fds
    assert all(mover.is_closed for mover in movers.opened)
    # A worker on the CPU is nowhere.
    assert set(movers.worker_bus_ids) == {SlabArithmetic.bus_id if kind.has_gpu else ""}


def test_a_gpu_that_cannot_open_the_workers_memory(
    tmp_path: Path, movers: Movers, stream: Stream
) -> None:
    """`auto` goes through the host's memory, and says so; `device` insists."""
    movers.refuses_device_memory = True
    with gated_worker(tmp_path, has_gpu=True) as worker:
        with moeshm.connect(worker.address, engine_device="cuda:0") as client:
            assert client.slab == "pinned"
            assert client.stats().stepped_down == {"no peer access between these GPUs": 1}
            call = GpuCall.of(make_inputs(FREE, 1))
            call.submit(client, stream).wait(PATIENCE_S)
            call.check()
        with pytest.raises(DeviceError, match="no peer access"):
            moeshm.connect(worker.address, engine_device="cuda:0", transport="device")


def test_another_vendors_worker(tmp_path: Path, movers: Movers) -> None:
    assert not movers.opened
    with gated_worker(tmp_path, has_gpu=True) as worker:
        with moeshm.connect(worker.address, engine_device="hip:0") as client:
            assert client.slab == "pinned"
        with pytest.raises(DeviceError, match="only GPUs of the same vendor"):
            moeshm.connect(worker.address, engine_device="hip:0", transport="device")


def test_arguments(worker: GatedWorker, movers: Movers, kind: Kind, stream: Stream) -> None:
    assert not movers.opened
    call = GpuCall.of(make_inputs(FREE, 1))
    with moeshm.connect(worker.address) as plain:
        assert plain.slab is None
        with pytest.raises(InvalidCall, match="engine_device='cuda:0'"):
            call.submit(plain, stream)
    with connected(worker, kind) as client:
        with pytest.raises(InvalidCall, match="pass the stream"):
            client.submit(FREE, *call.arrays, out=call.out)
        with pytest.raises(InvalidCall, match="in the host's memory"):
            client.submit(FREE, *call.inputs[1:], stream=stream)
        with pytest.raises(InvalidCall, match="layer 9"):
            client.submit(9, *call.arrays, out=call.out, stream=stream)
        assert client.stats().calls == 0
    for options, match in (
        ({"engine_device": "gpu"}, "cuda:N or hip:N"),
        ({"engine_device": "cuda:0", "transport": "stream"}, "carries no arrays"),
        ({"transport": "device"}, "engine_device"),
    ):
        with pytest.raises(SettingError, match=match):
            moeshm.connect(worker.address, **options)  # type: ignore[arg-type]
    assert call.arrays[1].host.shape[1] == TOP_K


def test_an_error_is_heard_while_an_earlier_call_is_on_its_way(
    worker: GatedWorker, client: moeshm.ExpertClient, stream: Stream, kind: Kind
) -> None:
    """Of another stream; the output is nobody's result."""
    other = Stream()
    first = GpuCall.of(make_inputs(GATED, 1))
    pending = first.submit(client, stream)
    worker.next_turn()
    link = client._link
    link.views._numbers[client.view] = 77
    failing = GpuCall.of(make_inputs(FREE, 2)).submit(client, other)
    link.views._numbers[client.view] = 0
    if not kind.has_gpu:
        # The host computes one call after the other.
        worker.let_go()
    with pytest.raises(InvalidCall, match="view 77"):
        failing.wait(PATIENCE_S)
    if kind.has_gpu:
        assert not pending.done()
        worker.let_go()
    pending.wait(PATIENCE_S)
    first.check()
    other.close()


def test_threads_on_one_stream(client: moeshm.ExpertClient, stream: Stream) -> None:
    failures: list[BaseException] = []

    def call(thread: int) -> None:
        try:
            for tag in range(30):
                each = GpuCall.of(make_inputs(FREE, 100 * thread + tag))
                each.submit(client, stream, timeout_s=PATIENCE_S).wait(PATIENCE_S)
                each.check()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * PATIENCE_S)
    assert failures == []


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


def test_a_late_stream_of_anothers_does_not_end_the_session(
    client: moeshm.ExpertClient, stream: Stream
) -> None:
    """Behind it, a call misses its deadline; when its turn comes the worker says so."""
    other = Stream()
    held = stream.hold()
    first, second = (GpuCall.of(make_inputs(FREE, tag)) for tag in (1, 2))
    patient = first.submit(client, stream)
    hasty = second.submit(client, other, timeout_s=0.2)
    with pytest.raises(NotReady):
        hasty.wait(1.0)
    held.set()
    patient.wait(PATIENCE_S)
    first.check()
    with pytest.raises(DeadlineExceeded, match="deadline passed"):
        hasty.wait(PATIENCE_S)
    assert client.stats().reconnects == 0
    other.close()


def test_a_stream_that_is_captured(client: moeshm.ExpertClient, stream: Stream) -> None:
    stream.is_capturing = True
    with pytest.raises(InvalidCall, match="captured into a graph"):
        GpuCall.of(make_inputs(FREE, 1)).submit(client, stream)
    stream.is_capturing = False
    call = GpuCall.of(make_inputs(FREE, 2))
    call.submit(client, stream).wait(PATIENCE_S)
    call.check()


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
    gate, take = threading.Event(), movers.opened[0].take

    def take_late(handle: int, *arguments: Any) -> None:
        stream.do(lambda: gate.wait(PATIENCE_S))
        take(handle, *arguments)

    monkeypatch.setattr(movers.opened[0], "take", take_late)
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


def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise DeviceError("no GPU cuda:7; CuPy sees cuda:0")

    monkeypatch.setattr(engine_device, "open_mover", refuse)
    with (
        gated_worker(tmp_path, has_gpu=True) as worker,
        pytest.raises(DeviceError, match="no GPU cuda:7"),
    ):
        moeshm.connect(worker.address, engine_device="cuda:7")


@pytest.mark.parametrize("step", ["give", "take"])
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
    earlier = GpuCall.of(make_inputs(FREE, 1))
    first = earlier.submit(client, stream)
    first.wait(PATIENCE_S)

    def fail(*_arguments: object) -> None:
        raise error("not today")

    monkeypatch.setattr(movers.opened[0], step, fail)
    with pytest.raises(error):
        GpuCall.of(make_inputs(FREE, 2)).submit(client, stream)
    call = GpuCall.of(make_inputs(FREE, 3))
    with within(SOON_S):
        call.submit(client, stream).wait(PATIENCE_S)
    call.check()
    assert client.stats().reconnects == 1
    stream.synchronize()
    wait_until(lambda: movers.opened[0].is_closed)


def test_a_long_pause_between_calls(
    client: moeshm.ExpertClient, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After which nobody looks after anything until something is on its way."""
    monkeypatch.setattr(device_watch, "_IDLE_LOOKS", 1)
    for tag in range(3):
        call = GpuCall.of(make_inputs(FREE, tag))
        future = call.submit(client, stream)
        watch = client._link.device_calls._watch  # type: ignore[union-attr]
        # By nobody but the thread that looks after it.
        stream.synchronize()
        wait_until(lambda: not watch.parts)  # noqa: B023
        wait_until(lambda: watch._is_asleep)  # noqa: B023
        assert future.done()
        call.check()


def test_experts_that_are_held_later(movers: Movers, stream: Stream) -> None:
    """Of a layer that the worker was not started with, served by its host."""
    assert not movers.opened
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((5, 128), np.float32)
    ids, weights = np.tile(np.arange(4, dtype=np.int32), (5, 1)), np.ones((5, 4), np.float32)
    with moeshm.spawn_worker(tiny_moe_path(), layers=[3], engine_device="cuda:0") as client:
        view = client.hold({1: [7, 5, 3, 1]})
        expected = client.compute(1, hidden, ids, weights, view=view)
        arrays, out = [GpuArray(each) for each in (hidden, ids, weights)], GpuArray(hidden.copy())
        client.submit(1, *arrays, out=out, view=view, stream=stream).wait(PATIENCE_S)
        np.testing.assert_array_equal(out.host, expected)
        # The same experts by the model's numbers.
        named = GpuArray(np.array([7, 5, 3, 1], np.int64)[ids])
        again = GpuArray(np.zeros_like(hidden))
        client.submit(
            1, arrays[0], named, arrays[2], out=again, view=view, global_ids=True, stream=stream
        ).wait(PATIENCE_S)
        np.testing.assert_array_equal(again.host, expected)
        named.host[2, 3] = 6
        with pytest.raises(InvalidCall, match="expert 6 of layer 1 is not on this worker"):
            client.submit(
                1, arrays[0], named, arrays[2], out=again, view=view, global_ids=True, stream=stream
            ).wait(PATIENCE_S)


# A child may only end, which Python 3.12 and later cannot know.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child(client: moeshm.ExpertClient, stream: Stream) -> None:
    """Neither waits for the parent's calls, nor makes any."""
    held = stream.hold()
    future = GpuCall.of(make_inputs(FREE, 1)).submit(client, stream)
    pid = os.fork()
    if pid == 0:
        n_refused = 0
        for attempt in (
            lambda: future.wait(1.0),
            lambda: GpuCall.of(make_inputs(FREE, 2)).submit(client, stream),
        ):
            try:
                attempt()
            except ForkedProcess:
                n_refused += 1
        os._exit(n_refused)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    held.set()
    future.wait(PATIENCE_S)
