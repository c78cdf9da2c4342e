"""The arithmetic backend on a made-up GPU that takes calls from slabs by itself.

Its device memory is a file without a name, and the handle the path by which others open it.
"""

from __future__ import annotations

import functools
import mmap
import os
import queue
import threading
from collections.abc import Callable

import numpy as np

from moeshm._words import load_word, store_word
from moeshm.backends import BetweenSteps, SlabCall
from moeshm.dtypes import Array
from moeshm.transport.slab import DONE, FLAGS_BYTES, GIVEN, REFUSED, SLOT_BYTES
from tests.crash.arithmetic import STEPPED, ArithmeticBackend


class SlabArithmetic(ArithmeticBackend):
    """A `SlabUser`; what is enqueued is done in order by a thread, the device."""

    vendor = "cuda"
    bus_id = "0000:1b:00.0"

    def __init__(self, on_turn: Callable[[int, int], None] = lambda _layer, _tag: None) -> None:
        super().__init__(on_turn)
        self._plain = ArithmeticBackend()
        self.enqueued: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def open_slab(self, memory: memoryview, device_bytes: int) -> _Slab:
        """As `SlabUser.open_slab`."""
        return _Slab(self, memory, device_bytes)

    def compute(
        self, layer: int, arrays: tuple[Array, Array, Array, Array], step: int | None
    ) -> None:
        """As `ffn`, or the row of one step, told of as by `SteppingArithmetic`."""
        if step is None:
            self.ffn(layer, *arrays)
            return
        self._on_turn(layer, 100 * int(arrays[0][0, 0]) + step)
        hidden, ids, weights, out = (each[step : step + 1] for each in arrays)
        self._plain.ffn(layer, hidden, ids, weights, out)

    def _run(self) -> None:
        while True:
            self.enqueued.get()()


class _Slab:
    def __init__(self, backend: SlabArithmetic, memory: memoryview, device_bytes: int) -> None:
        self._backend = backend
        self._flags, self._data = memory, memory[FLAGS_BYTES:]
        self._fd = -1
        self.handle = b""
        if device_bytes:
            self._fd = os.memfd_create("device", os.MFD_CLOEXEC)
            os.ftruncate(self._fd, device_bytes)
            self._data = memoryview(mmap.mmap(self._fd, device_bytes))
            self.handle = f"/proc/{os.getpid()}/fd/{self._fd}".encode()

    def share_of_step(self, _call: SlabCall) -> float:
        """As `WorkerSlab.share_of_step`."""
        return 0.0

    def prepare(self, call: SlabCall) -> None:
        """As `WorkerSlab.prepare`."""

    def enqueue(self, call: SlabCall, between_steps: BetweenSteps) -> None:
        """As `WorkerSlab.enqueue`: a step for each token of a call to STEPPED."""
        # Not before the arrays are there.
        assert load_word(self._flags, call.places.slot * SLOT_BYTES + GIVEN) == call.sequence
        if call.layer != STEPPED:
            self._backend.enqueued.put(lambda: self._compute(call))
            return
        for token in range(call.n_tokens):
            if token:
                self.wait()
                if between_steps.is_due():
                    between_steps()
            self._backend.enqueued.put(functools.partial(self._compute, call, token))

    def wait(self) -> None:
        """As `WorkerSlab.wait`."""
        is_idle = threading.Event()
        self._backend.enqueued.put(is_idle.set)
        is_idle.wait()

    def close(self) -> None:
        """As `WorkerSlab.close`."""
        if self._fd < 0 and not self._flags:
            return
        self.wait()
        if self._fd >= 0:
            # Somebody else's from now on.
            self._data[:] = b"\xff" * len(self._data)
            os.close(self._fd)
        self._fd, self._flags, self._data = -1, memoryview(b""), memoryview(b"")

    def _compute(self, call: SlabCall, step: int | None = None) -> None:
        """All of it, or a step."""
        info, places = self._backend.layers[call.layer], call.places
        rows, pairs = (call.n_tokens, info.hidden_size), (call.n_tokens, call.top_k)
        ids = self._array(places.topk_ids, np.dtype(np.int32), pairs).copy()
        wrong = np.flatnonzero((ids < -1) | (ids >= call.n_ids))
        ids.reshape(-1)[wrong] = -1
        slots = ids if call.slots is None else call.slots[ids]
        out = self._array(places.out, call.dtype.numpy, rows)
        hidden = self._array(places.hidden_states, call.dtype.numpy, rows)
        weights = self._array(places.topk_weights, np.dtype(np.float32), pairs)
        try:
            self._backend.compute(call.layer, (hidden, slots, weights, out), step)
        except RuntimeError:
            out[...] = 0
        flags = places.slot * SLOT_BYTES
        if wrong.size:
            store_word(self._flags, flags + REFUSED, int(wrong[0]) + 1)
        if step is None or step == call.n_tokens - 1:
            store_word(self._flags, flags + DONE, call.sequence)

    def _array(self, offset: int, dtype: np.dtype[np.generic], shape: tuple[int, int]) -> Array:
        found: Array = np.frombuffer(self._data, dtype, shape[0] * shape[1], offset)
        return found.reshape(shape)
