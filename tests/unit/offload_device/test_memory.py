"""Whose memory an offload uses on the engine's GPU: what a stream still does spoils nothing."""

from __future__ import annotations

import contextlib
import select
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeshm.arrays import Inputs
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.dtypes import DType
from moeshm.engine_device import EngineDevice
from moeshm.errors import InvalidCall
from moeshm.offload import ExpertOffload
from moeshm.offload.gpu_activations import EngineGpu, _InSlab
from moeshm.offload.gpu_lanes import Term
from moeshm.placement import LayerPlacement, Placement
from moeshm.policy import Policy
from tests.checkpoints import random_layer
from tests.crash.arithmetic import GATED, make_inputs
from tests.crash.processes import GatedWorker, gated_worker
from tests.engine_gpu import PATIENCE_S, GpuArray, Stream
from tests.simt.device import FEATURES, SimtDevice
from tests.wire import meanwhile

from ..host_lanes import BUS_ID, HostLane, HostLanes
from .offloads import SOON_S, draw, expected, on_gpu, placement


@pytest.mark.usefixtures("_uncalibrated", "movers")
def test_a_result_is_in_no_memory_that_was_lent(
    tmp_path: Path, lanes: HostLanes, stream: Stream
) -> None:
    """One worker is lost, and the other computes all rows, on a stream that has its memory back
    while the caller's still reads."""
    del lanes
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(gated_worker(tmp_path, has_gpu=True, name=name))
            for name in "ab"
        }
        offload = stack.enter_context(
            ExpertOffload(
                {name: each.address for name, each in workers.items()},
                placement("a", "b"),
                policy=Policy(transport="device"),
                engine_device="cuda:0",
            )
        )
        call = make_inputs(GATED, 3, 1)[1:]
        call[1][:] = 0

        def kill_who_is_asked() -> None:
            by_fd = {each._events._fd: each for each in workers.values()}
            (fd, *_), _, _ = select.select(list(by_fd), [], [], PATIENCE_S)
            asked = by_fd.pop(fd)
            asked.next_turn()
            asked.process.kill()
            (other,) = by_fd.values()
            other.let_go()

        with meanwhile(kill_who_is_asked):
            result = offload.forward(GATED, *on_gpu(*call), timeout_s=SOON_S, stream=stream)
        assert sum(offload.stats().losses.values()) == 1
        gate, read = stream.hold(), []
        host = result.host
        stream.do(lambda: read.append(host.copy()))
        del result
        assert offload._gpu is not None
        for lane in list(offload._gpu._idle):
            assert isinstance(lane, HostLane)
            spoiler = lane.put(np.full_like(call[0], 7))
            lane.wait()
            assert spoiler.host.shape == host.shape
        gate.set()
        stream.synchronize()
        np.testing.assert_array_equal(read[0], expected(GATED, call))


def _hot(monkeypatch: pytest.MonkeyPatch, before: Any) -> tuple[ExpertOffload, GpuBackend]:
    """All experts on the engine's GPU; `before` is called when a forward begins to compute them."""
    layer = random_layer(1, weight_dtype=DType.F32)
    backend = GpuBackend({0: layer}, SimtDevice(FEATURES._replace(bus_id=BUS_ID)))
    backend.vendor = "cuda"
    computes = EngineGpu.computes

    def also(gpu: EngineGpu, each: GpuBackend) -> bool:
        before()
        return computes(gpu, each)

    monkeypatch.setattr(EngineGpu, "computes", also)
    info = layer.info
    hot = Placement([], {0: LayerPlacement(info.num_experts, info.experts, {})})
    return ExpertOffload({}, hot, local=backend, engine_device="cuda:0"), backend


def _draw_for(backend: GpuBackend, seed: int) -> tuple[Any, Any, Any]:
    info, rng = backend.layers[0], np.random.default_rng(seed)
    ids = rng.integers(0, info.num_experts, (5, info.top_k), dtype=np.int32)
    x = rng.standard_normal((5, info.hidden_size), np.float32)
    return x, ids, rng.random(ids.shape, np.float32)


def test_the_hot_part_is_in_no_memory_that_the_caller_s_stream_still_writes(
    lanes: HostLanes, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of another thread on that stream, which has dropped it and got its work enqueued."""
    gates: list[Any] = []

    def write_later() -> None:
        info = backend.layers[0]
        temporary = lanes.allocate(stream.ptr, (5, info.hidden_size), np.dtype(np.float32))
        host = temporary.host
        gates.append(stream.hold())
        stream.do(lambda: host.fill(7))

    offload, backend = _hot(monkeypatch, write_later)
    with offload:
        call = _draw_for(backend, 1)
        result = offload.forward(0, *on_gpu(*call), stream=stream)
        gates[0].set()
        stream.synchronize()
        np.testing.assert_array_equal(result.host, offload.forward(0, *call))


def test_the_hot_part_waits_for_who_had_its_memory_before(
    lanes: HostLanes, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another stream's sum is still to be read from there: the backend has a stream of its own."""
    del lanes
    gates: list[Any] = []

    def hold_once() -> None:
        if not gates:
            gates.append(stream.hold())

    offload, backend = _hot(monkeypatch, hold_once)
    wait = HostLane.wait

    def let_go_and_wait(lane: HostLane) -> None:
        if len(results) == 1:
            gates[0].set()
        wait(lane)

    monkeypatch.setattr(HostLane, "wait", let_go_and_wait)
    results: list[GpuArray] = []
    other = Stream()
    with offload:
        calls = [_draw_for(backend, 1), _draw_for(backend, 2)]
        for call, each in zip(calls, (stream, other), strict=True):
            results.append(offload.forward(0, *on_gpu(*call), stream=each))
        gates[0].set()
        for call, each, result in zip(calls, (stream, other), results, strict=True):
            each.synchronize()
            np.testing.assert_array_equal(result.host, offload.forward(0, *call))
    other.close()


def test_the_hot_part_is_put_there_when_no_worker_is_waited_for(
    lanes: HostLanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller's stream waits for them, and a driver may wait for it with a copy."""
    gpu = EngineGpu(EngineDevice("cuda:0", "cuda", 0, "auto"))
    x, ids, weights = draw(1)
    given = gpu.probe(Inputs(x, ids, weights, DType.F32, 0, False))

    def refuse(*_arguments: object) -> None:
        raise AssertionError("too early")

    with monkeypatch.context() as patch:
        patch.setattr(HostLane, "put", refuse)
        given.add(x)
        given.add(x)
    result = given.result()
    lanes.made[0].wait()
    np.testing.assert_array_equal(result.host, 2 * x)


class _Passed:
    """A `DeviceFuture` whose stream may have passed it already."""

    n_parts, bytes_out, timeout_s = 1, 64, 1.0

    def __init__(self, is_done: bool) -> None:
        self._is_done = is_done
        self.deadline = time.monotonic() + PATIENCE_S

    def done(self) -> bool:
        """As `DeviceFuture.done`."""
        return self._is_done

    def wait(self, timeout_s: float) -> None:
        """As `DeviceFuture.wait`, which takes its time."""
        assert 0 < timeout_s <= PATIENCE_S
        until_ns = time.perf_counter_ns() + 100_000
        while time.perf_counter_ns() < until_ns:
            pass


@pytest.mark.parametrize("is_done", [True, False])
def test_a_slab_that_was_done_was_not_waited_for(is_done: bool) -> None:
    """To see that it is teaches nothing of its worker."""
    future: Any = _Passed(is_done)
    pending = _InSlab(future, Term(None, None), 64, time.perf_counter_ns())
    pending.take()
    assert pending.times is not None
    assert (pending.times.wait_ns == 0) == is_done


class _Foreign:
    """An array of another library's."""

    def __init__(self, array: GpuArray) -> None:
        self.__cuda_array_interface__ = array.__cuda_array_interface__


@pytest.mark.parametrize("which", ["topk_ids", "topk_weights"])
@pytest.mark.usefixtures("_uncalibrated", "movers", "lanes")
def test_arrays_of_several_libraries_are_refused(
    worker: GatedWorker, stream: Stream, which: str
) -> None:
    with ExpertOffload({"w": worker.address}, placement("w"), engine_device="cuda:0") as offload:
        x, ids, weights = on_gpu(*draw(1))
        given = {"topk_ids": ids, "topk_weights": weights}
        mixed: dict[str, Any] = {**given, which: _Foreign(given[which])}
        with pytest.raises(
            InvalidCall, match=rf"{which} is .*_Foreign, and hidden_states .*GpuArray; pass all"
        ):
            offload.forward(0, x, **mixed, stream=stream)
        assert offload.stats().forwards == 0
