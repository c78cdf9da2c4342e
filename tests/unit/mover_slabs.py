"""Slabs of pinned and of device memory with a mover whose GPU is the shim, for tests of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from moeshm._words import load_word, store_word
from moeshm.backends.gpu import mover
from moeshm.backends.gpu.device import Memory
from moeshm.backends.gpu.mover import Mover
from moeshm.device_arrays import DeviceInputs
from moeshm.dtypes import Array, DType, dtype_of, narrow, widen
from moeshm.transport import slab
from moeshm.transport.slab import DONE, FLAGS_BYTES, SLOT_BYTES, Places
from tests.simt.device import SimtDevice

DATA_BYTES = slab.PAGE_BYTES
HIDDEN_SIZE, TOP_K = 72, 3
KIB = 1 << 10
AT = Places(5, hidden_states=4096, topk_ids=256 * KIB, topk_weights=384 * KIB, out=512 * KIB)
OTHER = Places(31, *(1024 * KIB + offset for offset in AT[1:]))
STREAM = 0xCAFE
CALLERS_DEVICE, MOVERS_DEVICE = 3, 1


#: Of the engine's GPU, and of another one.
OWN_BUS_ID, ANOTHERS_BUS_ID = "0000:1a:00.0", "0000:1b:00.0"


class Runtime:
    """In the place of CuPy's, which knows the thread's current device."""

    current = CALLERS_DEVICE

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(mover, "_runtime", lambda: self)

    def getDevice(self) -> int:
        return self.current

    def setDevice(self, index: int) -> None:
        self.current = index


class Slab:
    """A slab as the worker has it, and a mover of the engine's."""

    def __init__(
        self, memory: memoryview, data: Array, made: Mover, device: SimtDevice, worker_bytes: int
    ) -> None:
        self.memory = memory
        #: Of pinned or of device memory.
        self.data = data
        self.mover = made
        self.device = device
        #: Device memory that is the worker's.
        self.worker_bytes = worker_bytes

    def close(self) -> None:
        """It is unmapped, though a test still refers to this."""
        self.memory, self.data = memoryview(b""), np.empty(0, np.uint8)

    @property
    def left(self) -> tuple[Any, ...]:
        """What the mover has of the device: registered and opened memory, device's and pinned."""
        each = self.device
        return (
            dict(each.registered),
            [*each.opened],
            each.device_bytes - self.worker_bytes,
            each.pinned_bytes,
        )

    def flag(self, at: Places, which: int) -> int:
        """As it is now."""
        return load_word(self.memory, at.slot * SLOT_BYTES + which)

    def answer(self, at: Places, sequence: int, output: Array) -> None:
        """What the worker's GPU does."""
        stored = output.reshape(-1).view(np.uint8)
        self.data[at.out : at.out + stored.nbytes] = stored
        store_word(self.memory, at.slot * SLOT_BYTES + DONE, sequence)

    def found(self, offset: int, like: Array) -> Array:
        """What is in its data."""
        stored = self.data[offset : offset + like.nbytes]
        return stored.view(like.dtype).reshape(like.shape)


class Call:
    """The arrays of one, in the device's memory, which is the host's here."""

    def __init__(
        self,
        n_tokens: int,
        dtype: DType = DType.BF16,
        ids_dtype: Any = np.int32,
        weights_dtype: DType = DType.F32,
        *,
        hidden_size: int = HIDDEN_SIZE,
        top_k: int = TOP_K,
    ) -> None:
        rng = np.random.default_rng(n_tokens)
        rows, pairs = (n_tokens, hidden_size), (n_tokens, top_k)
        self.hidden = narrow(rng.standard_normal(rows, np.float32), dtype)
        self.ids = rng.integers(-1, 64, pairs).astype(ids_dtype)
        self.weights = narrow(rng.standard_normal(pairs, np.float32), weights_dtype)
        self.output = narrow(rng.standard_normal(rows, np.float32), dtype)
        self.out = np.zeros_like(self.output)

    @property
    def inputs(self) -> DeviceInputs:
        """As `device_arrays.check_device` has it."""
        return DeviceInputs(
            hidden_states=self.hidden.ctypes.data,
            topk_ids=self.ids.ctypes.data,
            topk_weights=self.weights.ctypes.data,
            n_tokens=len(self.hidden),
            hidden_size=self.hidden.shape[1],
            top_k=self.ids.shape[1],
            dtype=dtype_of(self.hidden),
            ids_itemsize=self.ids.itemsize,
            weights_dtype=dtype_of(self.weights),
            owners=(self.hidden, self.ids, self.weights),
        )

    def give(self, to: Slab, at: Places, sequence: int) -> None:
        """To the slab."""
        to.mover.give(STREAM, self.inputs, at, sequence)

    def take(self, source: Slab, at: Places, sequence: int) -> None:
        """From the slab."""
        source.mover.take(STREAM, self.out.ctypes.data, self.out.nbytes, at, sequence)

    def exchange(self, with_: Slab, at: Places, sequence: int) -> bool:
        """Both, if that is for it."""
        out, n_bytes = self.out.ctypes.data, self.out.nbytes
        return with_.mover.exchange(STREAM, self.inputs, out, n_bytes, at, sequence)

    def assert_given(self, to: Slab, at: Places) -> None:
        """What the worker finds."""
        np.testing.assert_array_equal(to.found(at.hidden_states, self.hidden), self.hidden)
        ids, weights = self.ids.astype(np.int32), widen(self.weights)
        np.testing.assert_array_equal(to.found(at.topk_ids, ids), ids)
        np.testing.assert_array_equal(to.found(at.topk_weights, weights), weights)


@contextlib.contextmanager
def opened_slab(
    device: SimtDevice,
    patch: pytest.MonkeyPatch,
    runtime: Runtime,
    kind: str,
    worker_bus_id: str = "",
) -> Iterator[Slab]:
    """A slab of that kind, whose mover takes `device` for its GPU."""
    patch.setattr(mover, "open_device", lambda _name: device)
    patch.setattr(device, "use", lambda: runtime.setDevice(MOVERS_DEVICE))
    pinned_bytes = DATA_BYTES if kind == "pinned" else 0
    segment, fd = slab.Segment.create(pinned_bytes)
    theirs = slab.Segment.attach(fd, pinned_bytes)
    os.close(fd)
    with contextlib.ExitStack() as stack:
        handle, data = b"", np.frombuffer(theirs.memory, np.uint8)[FLAGS_BYTES:]
        if kind == "device":
            allocated = stack.enter_context(contextlib.closing(device.allocate(DATA_BYTES)))
            handle, data = device.export(allocated), _bytes_of(allocated)
        worker_bytes = device.device_bytes
        made = Mover("cuda:1", segment.memory, handle, worker_bus_id)
        stack.enter_context(contextlib.closing(made))
        opened = Slab(theirs.memory, data, made, device, worker_bytes)
        yield stack.enter_context(contextlib.closing(opened))


def _bytes_of(memory: Memory) -> Array:
    array = (ctypes.c_uint8 * memory.nbytes).from_address(memory.address)
    return np.frombuffer(memoryview(array), np.uint8)


def done_by(device: SimtDevice, patch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels, and waits, that it does from now on."""
    names: list[str] = []
    do = device.do

    def note(command: Callable[..., None], *how: Any) -> None:
        names.append("wait" if command == device.wait_value else how[0].name)
        do(command, *how)

    patch.setattr(device, "do", note)
    return names
