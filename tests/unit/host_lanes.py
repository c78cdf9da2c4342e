"""`offload.gpu_lanes` for an engine's GPU that is made of the host: see tests/engine_gpu.py."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from moeshm.dtypes import Array, DType, narrow, widen
from moeshm.engine_device import EngineDevice
from moeshm.errors import DeviceError
from moeshm.offload import gpu_lanes
from moeshm.offload.gpu_lanes import Lane, Term
from tests.engine_gpu import PATIENCE_S, GpuArray, Stream

#: Of the engine's GPU.
BUS_ID = "0000:1b:00.0"


class HostLanes:
    """Those that were made, and their streams."""

    def __init__(self) -> None:
        self.made: list[HostLane] = []
        #: Streams that were made for lanes, and not by a test.
        self._streams: list[Stream] = []
        #: By stream, memory that was given back: for who asks next there, as of CuPy and torch.
        self._free: dict[int, list[Array]] = collections.defaultdict(list)
        self._lock = threading.Lock()
        self.has_gpu = True

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Be what an offload makes lanes by."""
        patch.setattr(gpu_lanes, "lane_of", self._lane_of)
        patch.setattr(gpu_lanes, "open_gpu", self._open)

    def new(self) -> HostLane:
        """One with a stream of its own."""
        self._streams.append(Stream())
        return self._on(self._streams[-1])

    def close(self) -> None:
        """When all is done."""
        while self._streams:
            self._streams.pop().close()

    def allocate(self, stream: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> GpuArray:
        """An array of that stream's memory, which has it back as soon as nobody knows it."""
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        with self._lock:
            free = self._free[stream]
            fitting = [each for each in free if len(each) == n_bytes]
            memory = fitting[-1] if fitting else np.full(n_bytes, 0xFF, np.uint8)
            self._free[stream] = [each for each in free if each is not memory]
        made = GpuArray(memory.view(dtype).reshape(shape))
        weakref.finalize(made, self._give_back, stream, memory).atexit = False
        return made

    def _give_back(self, stream: int, memory: Array) -> None:
        # Not under the lock, which this thread may hold.
        self._free[stream].append(memory)

    def _lane_of(self, _hidden_states: Any, stream: Stream, _engine: EngineDevice) -> HostLane:
        return self._on(stream)

    def _open(self, _engine: EngineDevice) -> tuple[HostLane, str]:
        if not self.has_gpu:
            raise DeviceError("no GPU here")
        return self.new(), BUS_ID

    def _on(self, stream: Stream) -> HostLane:
        self.made.append(HostLane(self, stream))
        return self.made[-1]


class HostLane:
    """A `Lane`: what is enqueued is done by the stream, in its turn."""

    def __init__(self, lanes: HostLanes, stream: Stream) -> None:
        self._lanes = lanes
        self._stream = stream
        self.stream = stream.ptr
        #: What was called.
        self.calls: list[str] = []

    def is_capturing(self) -> bool:
        """As `Lane.is_capturing`."""
        return self._stream.is_capturing

    def fetch(self, array: GpuArray, out: Array | None = None) -> Array:
        """As `Lane.fetch`."""
        self.calls.append("fetch")
        self._stream.synchronize()
        fetched = np.empty_like(array.host) if out is None else out
        fetched[...] = array.host
        return fetched

    def put(self, array: Array, dtype: DType | None = None) -> GpuArray:  # noqa: ARG002
        """As `Lane.put`."""
        copy = array.copy()
        return self._later(copy.shape, copy.dtype, lambda: copy)

    def take(self, array: GpuArray, rows: GpuArray) -> GpuArray:
        """As `Lane.take`."""
        self.calls.append("take")
        shape = len(rows.host), array.host.shape[1]
        # Their memory, which may be another's by then unless somebody knows them.
        values, numbers = array.host, rows.host
        return self._later(shape, values.dtype, lambda: values[numbers])

    def empty(self, shape: tuple[int, int], dtype: DType) -> GpuArray:
        """As `Lane.empty`."""
        return self._lanes.allocate(self.stream, shape, dtype.numpy)

    def address_of(self, array: GpuArray) -> int:
        """As `Lane.address_of`."""
        return int(array.host.ctypes.data)

    def add_up(self, shape: tuple[int, int], dtype: DType, terms: Sequence[Term]) -> GpuArray:
        """As `Lane.add_up`."""
        self.calls.append("add_up")
        first = terms[0].values if len(terms) == 1 and terms[0].rows is None else None
        if first is not None and first.host.dtype == dtype.numpy and not terms[0].is_lent:
            return first  # type: ignore[no-any-return]
        parts = [
            (slice(None) if rows is None else rows.host, values.host) for rows, values, _ in terms
        ]

        def add() -> Array:
            total = np.zeros(shape, np.float32)
            for rows, values in parts:
                total[rows] += widen(values)
            return narrow(total, dtype)

        return self._later(shape, dtype.numpy, add)

    def beside(self) -> Lane:
        """As `Lane.beside`."""
        return self._lanes.new()

    def follow(self, other: Lane) -> None:
        """As `Lane.follow`."""
        assert isinstance(other, HostLane)
        self.calls.append("follow")
        is_there = threading.Event()
        other._stream.do(is_there.set)
        self._stream.do(lambda: is_there.wait(PATIENCE_S))

    def wait(self) -> None:
        """As `Lane.wait`."""
        self._stream.synchronize()

    def holds(self, array: Any) -> bool:
        """As `Lane.holds`."""
        return isinstance(array, GpuArray)

    def _later(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], make: Callable[[], Array]
    ) -> GpuArray:
        made = self._lanes.allocate(self.stream, shape, dtype)
        host = made.host

        def do() -> None:
            host[...] = make()

        self._stream.do(do)
        return made
