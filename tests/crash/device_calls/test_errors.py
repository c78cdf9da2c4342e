"""Calls of a GPU's arrays that are refused, fail or are late by themselves; the session lives."""

from __future__ import annotations

import pytest

import moeshm
from moeshm.errors import DeadlineExceeded, InvalidCall, NotReady, SettingError, WorkerFailed
from tests.crash.arithmetic import BROKEN, FREE, GATED, TOP_K, make_inputs
from tests.crash.device_calls.calls import GpuCall, Kind, connected
from tests.crash.processes import GatedWorker
from tests.engine_gpu import PATIENCE_S, Movers, Stream


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


def test_a_stream_that_is_captured(client: moeshm.ExpertClient, stream: Stream) -> None:
    stream.is_capturing = True
    with pytest.raises(InvalidCall, match="captured into a graph"):
        GpuCall.of(make_inputs(FREE, 1)).submit(client, stream)
    stream.is_capturing = False
    call = GpuCall.of(make_inputs(FREE, 2))
    call.submit(client, stream).wait(PATIENCE_S)
    call.check()


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
