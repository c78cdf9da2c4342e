"""An engine's GPU made of the host: arrays, streams that run by themselves, and a mover.

Streams are threads, so that a call's parts happen when they are due and no sooner: what a stream
waits for, the host does not. A test can hold one for as long as it likes.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from moeshm._words import store_word, wait_for_word
from moeshm.device_arrays import DeviceInputs
from moeshm.dtypes import Array, widen
from moeshm.engine_device import EngineDevice
from moeshm.errors import DeviceError
from moeshm.transport.slab import DONE, FLAGS_BYTES, GIVEN, SLOT_BYTES, TAKEN, Places

PATIENCE_S = 30.0
_KINDS = {np.dtype(np.int32): "<i4", np.dtype(np.int64): "<i8"}
#: By handle.
_streams: dict[int, Stream] = {}
_handles = itertools.count(1000)


class GpuArray:
    """An array "on the GPU": it says so, and its memory is `host`."""

    def __init__(self, host: npt.NDArray[Any]) -> None:
        self.host = np.ascontiguousarray(host)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        kind = _KINDS.get(self.host.dtype, self.host.dtype.str)
        return {
            "shape": self.host.shape,
            "typestr": kind,
            "data": (self.host.ctypes.data, False),
            "version": 3,
        }


class Stream:
    """Does what is enqueued, in order, in a thread of its own; `ptr` as of CuPy's."""

    def __init__(self) -> None:
        self.ptr = next(_handles)
        self.is_capturing = False
        #: What went wrong in the thread.
        self.failures: list[BaseException] = []
        self._enqueued: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        _streams[self.ptr] = self
        self._thread.start()

    def do(self, what: Callable[[], object]) -> None:
        """Enqueue it."""
        self._enqueued.put(what)

    def hold(self) -> threading.Event:
        """Nothing that is enqueued from now on is done before the event is set."""
        event = threading.Event()
        self.do(lambda: event.wait(PATIENCE_S))
        return event

    def synchronize(self) -> None:
        """Until all that was enqueued is done."""
        event = threading.Event()
        self.do(event.set)
        assert event.wait(PATIENCE_S), "the stream waits for ever"
        assert not self.failures, self.failures

    def close(self) -> None:
        """When all is done."""
        self._enqueued.put(None)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the stream waits for ever"
        del _streams[self.ptr]
        assert not self.failures, self.failures

    def _run(self) -> None:
        while (what := self._enqueued.get()) is not None:
            try:
                what()
            except BaseException as error:
                self.failures.append(error)


class HostMover:
    """A `device_watch.Mover` whose GPU is the host.

    `handle`: a path to the slab's data; `most_exchanged`: bytes of rows that `exchange` is for.
    """

    def __init__(self, memory: memoryview, handle: bytes, most_exchanged: int = -1) -> None:
        self._flags = memory
        self._data = memory[FLAGS_BYTES:]
        if handle:
            try:
                fd = os.open(handle, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                raise DeviceError(f"{handle!r} cannot be opened: {error}") from error
            try:
                self._data = memoryview(mmap.mmap(fd, os.fstat(fd).st_size))
            finally:
                os.close(fd)
        self._most_exchanged = most_exchanged
        #: Calls that were given, and that were taken; and of these, the exchanged ones.
        self.n_given = self.n_taken = self.n_exchanged = 0
        #: Calls that are to be given, and taken.
        self._n_enqueued = [0, 0]
        self.is_closed = False

    def is_capturing(self, stream: int) -> bool:
        """As `Mover.is_capturing`."""
        return _streams[stream].is_capturing

    def give(self, stream: int, arrays: DeviceInputs, at: Places, sequence: int) -> None:
        """As `Mover.give`."""
        _streams[stream].do(lambda: self._give(arrays, at, sequence))
        self._n_enqueued[0] += 1

    def take(self, stream: int, out: int, n_bytes: int, at: Places, sequence: int) -> None:
        """As `Mover.take`."""
        _streams[stream].do(lambda: self._take(out, n_bytes, at, sequence))
        self._n_enqueued[1] += 1

    def exchange(
        self, stream: int, arrays: DeviceInputs, out: int, n_bytes: int, at: Places, sequence: int
    ) -> bool:
        """As `Mover.exchange`."""
        if n_bytes > self._most_exchanged:
            return False

        def do() -> None:
            self.n_exchanged += 1
            self._give(arrays, at, sequence)
            self._take(out, n_bytes, at, sequence)

        _streams[stream].do(do)
        self._n_enqueued[0] += 1
        self._n_enqueued[1] += 1
        return True

    def count_enqueued(self) -> tuple[int, int]:
        """As `Mover.count_enqueued`."""
        n_given, n_taken = self._n_enqueued
        return n_given, n_taken

    def _give(self, arrays: DeviceInputs, at: Places, sequence: int) -> None:
        assert not self.is_closed
        pairs = arrays.n_tokens * arrays.top_k
        ids = _read(arrays.topk_ids, np.dtype(f"<i{arrays.ids_itemsize}"), pairs)
        weights = _read(arrays.topk_weights, arrays.weights_dtype.numpy, pairs)
        self.put(at.hidden_states, _read(arrays.hidden_states, np.uint8, arrays.n_bytes))
        self.put(at.topk_ids, ids.astype(np.int32))
        self.put(at.topk_weights, widen(weights))
        self.n_given += 1
        store_word(self._flags, at.slot * SLOT_BYTES + GIVEN, sequence)

    def _take(self, out: int, n_bytes: int, at: Places, sequence: int) -> None:
        assert not self.is_closed
        done = at.slot * SLOT_BYTES + DONE
        limit_ns = int(PATIENCE_S * 1e9)
        assert wait_for_word(self._flags, done, sequence, limit_ns, 0), "waits for ever"
        output = self.fetch(at.out, n_bytes)
        ctypes.memmove(out, output.ctypes.data, n_bytes)
        self.n_taken += 1
        store_word(self._flags, at.slot * SLOT_BYTES + TAKEN, sequence)

    def fetch(self, offset: int, n_bytes: int) -> Array:
        """As `Mover.fetch`."""
        copy: Array = np.frombuffer(self._data, np.uint8, n_bytes, offset).copy()
        return copy

    def put(self, offset: int, array: Array) -> None:
        """As `Mover.put`."""
        stored = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        np.frombuffer(self._data, np.uint8, stored.nbytes, offset)[...] = stored

    def close(self) -> None:
        """As `Mover.close`."""
        assert self.n_given >= self.n_taken
        self.is_closed = True
        self._flags = self._data = memoryview(b"")


class Movers:
    """Stands in for `engine_device.open_mover`: those that were opened, and what is refused."""

    def __init__(self) -> None:
        self.opened: list[HostMover] = []
        self.refuses_device_memory = False
        #: Of a HostMover.
        self.most_exchanged = -1
        #: As they were said.
        self.worker_bus_ids: list[str] = []

    def open(
        self, _engine: EngineDevice, memory: memoryview, handle: bytes, worker_bus_id: str
    ) -> HostMover:
        """As `open_mover`."""
        self.worker_bus_ids.append(worker_bus_id)
        if handle and self.refuses_device_memory:
            raise DeviceError("no peer access between these GPUs")
        self.opened.append(HostMover(memory, handle, self.most_exchanged))
        return self.opened[-1]


def _read(address: int, dtype: npt.DTypeLike, n: int) -> Array:
    kind = np.dtype(dtype)
    copy: Array = np.frombuffer(ctypes.string_at(address, n * kind.itemsize), kind)
    return copy
