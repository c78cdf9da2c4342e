"""The engine's side of a slab: its GPU puts a call's arrays in, and takes the output out."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ...device_arrays import DeviceInputs
from ...dtypes import Array
from ...transport.slab import DONE, FLAGS_BYTES, GIVEN, SLOT_BYTES, SLOTS, TAKEN, Places
from ._launch import Fields, address_of
from .cupy_device import open_device
from .device import Bytes, CommandList, Device, Features, Kernel

#: Of the pinned memory that arrays are fetched and put through.
_BOUNCE_BYTES = 1 << 20
#: Threads of a block, and vectors of 16 bytes that each loads together, as kernels/move.cu has it.
_THREADS, _AHEAD = 256, 8
#: Of a kernel that waits for a flag, by itself or ahead of one that takes more. As many calls wait
#: as there are slots, each on a stream of its own perhaps, and what one of them waits for may be
#: enqueued behind them: they must never fill the GPU.
_AWAITING_BLOCKS = 1
#: What one such kernel moves: all vectors of a thread are loaded together, 32 KiB by its block, and
#: a thread has one pair at most.
_MOST_FEW, _MOST_PAIRS = _AWAITING_BLOCKS * _THREADS * _AHEAD, _AWAITING_BLOCKS * _THREADS


class Given(ctypes.Structure):
    """As kernels/move.cu has it: what `give` and `exchange` copy."""

    _fields_ = (
        ("hidden_states", ctypes.c_uint64),
        ("topk_ids", ctypes.c_uint64),
        ("topk_weights", ctypes.c_uint64),
        ("slab_hidden_states", ctypes.c_uint64),
        ("slab_topk_ids", ctypes.c_uint64),
        ("slab_topk_weights", ctypes.c_uint64),
        ("n_bytes", ctypes.c_int64),
        ("n_pairs", ctypes.c_int32),
        ("ids_bytes", ctypes.c_int32),
        ("weights_dtype", ctypes.c_int32),
    )


class Taken(ctypes.Structure):
    """As kernels/move.cu has it: what `take` and `await_and_take` copy."""

    _fields_ = (
        ("slab_out", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("done", ctypes.c_uint64),
        ("n_bytes", ctypes.c_int64),
    )


class Answer(ctypes.Structure):
    """As kernels/move.cu has it: what `exchange` awaits and copies, and its flags."""

    _fields_ = (
        ("slab_out", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("given", ctypes.c_uint64),
        ("done", ctypes.c_uint64),
        ("taken", ctypes.c_uint64),
        ("value", ctypes.c_uint32),
    )


class Signal(ctypes.Structure):
    """As kernels/move.cu has it: the flag that tells of the end, and what counts up to it: that is
    the slot's, as several streams may be at it."""

    _fields_ = (
        ("flag", ctypes.c_uint64),
        ("n_done", ctypes.c_uint64),
        ("value", ctypes.c_uint32),
    )


class Mover:
    """Moves arrays between a GPU and a slab, on streams of the engine's.

    `memory`: the slab's segment, mapped whole; `handle`: what its data is opened by if that is
    device memory, else empty; `worker_bus_id`: where the worker's GPU is, as `Features.bus_id`. One
    thread at a time may give, take and exchange; `fetch` and `put` may be called by another
    meanwhile. A caller's current device is left as it was. DeviceError: the driver refuses
    something; nothing is left behind then.
    """

    def __init__(
        self, device_name: str, memory: memoryview, handle: bytes, worker_bus_id: str = ""
    ) -> None:
        # What was done is undone while the GPU is still the thread's.
        with _current_device_kept(), contextlib.ExitStack() as undo:
            device = self._device = open_device(device_name)
            device.use()
            self._runtime = _runtime()
            self._index: int = self._runtime.getDevice()
            registration = device.register(
                address_of(memory), memory.nbytes, read_only=memory.readonly
            )
            undo.callback(registration.close)
            self._flags = registration.device_address
            self._data = self._flags + FLAGS_BYTES
            if handle:
                opened = device.open_exported(handle)
                undo.callback(opened.close)
                self._data = opened.address
            # Not when it is needed: then a stream waits for what is fetched through it, and drivers
            # wait for every stream when they allocate or free such memory.
            self._bounce = device.pin(_BOUNCE_BYTES)
            undo.callback(self._bounce.close)
            counts = device.allocate(4 * SLOTS)
            undo.callback(counts.close)
            self._counts = counts.address
            self._copy_in(self._counts, np.zeros(SLOTS, np.uint32))
            self._make_launches(may_await=_may_await(device.features, worker_bus_id))
            self._undo = undo.pop_all()
        self._memory: memoryview | None = memory
        #: Of a pinned slab, as the host has it; None if it is device memory.
        self._host_data: Bytes | None = None
        if not handle:
            self._host_data = np.frombuffer(memory, np.uint8)[FLAGS_BYTES:]

    def is_capturing(self, stream: int) -> bool:
        """Whether what is enqueued on the stream is recorded into a graph instead."""
        try:
            return bool(self._runtime.streamIsCapturing(stream))
        except RuntimeError:
            # The default stream, while another one is captured.
            return True

    def give(self, stream: int, arrays: DeviceInputs, at: Places, sequence: int) -> None:
        """Enqueue the copies of a call's arrays into the slab, and then setting `given`.

        `stream`: its handle; 0 is the default one. DeviceError: the driver refuses.
        """
        slot, hidden_states, topk_ids, topk_weights, _ = at
        data, flags = self._data, self._flags + slot * SLOT_BYTES
        n_bytes, n_pairs = arrays.n_bytes, arrays.n_tokens * arrays.top_k
        self._given.set(
            arrays.hidden_states,
            arrays.topk_ids,
            arrays.topk_weights,
            data + hidden_states,
            data + topk_ids,
            data + topk_weights,
            n_bytes,
            n_pairs,
            arrays.ids_itemsize,
            arrays.weights_dtype,
            flags + GIVEN,
            self._counts + slot * 4,
            sequence,
        )
        self._enqueue(self._give.of(n_bytes // 16 + n_pairs), stream)

    def take(self, stream: int, out: int, n_bytes: int, at: Places, sequence: int) -> None:
        """Enqueue waiting for `done`, the copy of the output to `out`, and setting `taken`.

        `out`: an address of the engine's GPU, a multiple of 16 as `n_bytes` is. DeviceError: the
        driver refuses; the stream may wait all the same.
        """
        slot, *_, slab_out = at
        flags, n_vectors = self._flags + slot * SLOT_BYTES, n_bytes // 16
        done = flags + DONE
        self._taken.set(
            self._data + slab_out,
            out,
            done,
            n_bytes,
            flags + TAKEN,
            self._counts + slot * 4,
            sequence,
        )
        takes = self._takes_few if n_vectors <= _MOST_FEW else self._takes
        commands = takes.of(n_vectors)
        if takes.waits:
            commands.set_value(0, done, sequence)
        self._enqueue(commands, stream)

    def exchange(
        self, stream: int, arrays: DeviceInputs, out: int, n_bytes: int, at: Places, sequence: int
    ) -> bool:
        """Enqueue all that `give` and `take` do as one launch; False, and nothing is enqueued,
        where these are for such a call.

        Only for a call whose worker was told of it: the launch waits for the worker. DeviceError:
        the driver refuses, and nothing is enqueued.
        """
        commands = self._exchange
        if commands is None or n_bytes > 16 * _MOST_FEW:
            return False
        n_pairs = arrays.n_tokens * arrays.top_k
        if n_pairs > _MOST_PAIRS:
            return False
        slot, hidden_states, topk_ids, topk_weights, slab_out = at
        data, flags = self._data, self._flags + slot * SLOT_BYTES
        self._exchanged.set(
            arrays.hidden_states,
            arrays.topk_ids,
            arrays.topk_weights,
            data + hidden_states,
            data + topk_ids,
            data + topk_weights,
            n_bytes,
            n_pairs,
            arrays.ids_itemsize,
            arrays.weights_dtype,
            data + slab_out,
            out,
            flags + GIVEN,
            flags + DONE,
            flags + TAKEN,
            sequence,
        )
        self._enqueue(commands, stream)
        return True

    def count_enqueued(self) -> tuple[int, int]:
        """How many calls were given and taken on streams, up to now: also where that was
        interrupted as it ended."""
        exchanged = 0 if self._exchange is None else self._exchange.n_enqueued
        few = 0 if self._takes_few is self._takes else self._takes_few.n_enqueued
        return self._give.n_enqueued + exchanged, self._takes.n_enqueued + few + exchanged

    def fetch(self, offset: int, n_bytes: int) -> Bytes:
        """A copy, as uint8, of what is there in the slab's data. DeviceError."""
        if self._host_data is not None:
            return np.array(self._host_data[offset : offset + n_bytes])
        with _current_device_kept():
            self._device.use()
            return self._copy_out(self._data + offset, n_bytes)

    def put(self, offset: int, array: Array) -> None:
        """Copy the array to there. DeviceError."""
        stored = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if self._host_data is not None:
            self._host_data[offset : offset + stored.nbytes] = stored
            return
        with _current_device_kept():
            self._device.use()
            self._copy_in(self._data + offset, stored)

    def close(self) -> None:
        """Let go of the slab, which nothing on a stream uses any more; twice does nothing.

        DeviceError: the driver refuses something; the rest is let go of.
        """
        if self._memory is None:
            return
        try:
            with _current_device_kept():
                self._device.use()
                self._undo.close()
        finally:
            # The memory stays mapped until here.
            self._memory = self._host_data = None

    def _make_launches(self, *, may_await: bool) -> None:
        module, device = self._device.compile("move.cu", {}), self._device
        n_blocks = device.features.multiprocessors
        given, taken = (Given(), Signal()), (Taken(), Signal())
        self._given, self._taken = _all_fields(*given), _all_fields(*taken)
        self._give = _Launches(device, [module.kernel("give")], given, n_blocks)
        take = module.kernel("take")
        #: None where no kernel may wait.
        self._exchange: CommandList | None = None
        if may_await:
            kernels = [module.kernel("await_done"), take]
            self._takes = _Launches(device, kernels, taken, n_blocks)
            kernels = [module.kernel("await_and_take")]
            self._takes_few = _Launches(device, kernels, taken, _AWAITING_BLOCKS)
            exchanged = (Given(), Answer())
            kernels = [module.kernel("exchange")]
            self._exchanged = _all_fields(*exchanged)
            self._exchange = _Launches(device, kernels, exchanged, _AWAITING_BLOCKS).of(0)
        else:
            self._takes = _Launches(device, [take], taken, n_blocks, waits=True)
            self._takes_few = self._takes

    def _enqueue(self, commands: CommandList, stream: int) -> None:
        # Not by `_current_device_kept`, whose costs a call would notice.
        current: int = self._runtime.getDevice()
        # Also if it is that one already: a thread's first call to the driver needs it.
        self._device.use()
        try:
            commands.enqueue(stream)
        finally:
            if current != self._index:
                self._runtime.setDevice(current)

    def _copy_in(self, to: int, array: Array) -> None:
        """On the device's own stream, by way of pinned memory; returns when it is done."""
        stored, bounce = array.view(np.uint8), self._bounce
        for first in range(0, stored.nbytes, _BOUNCE_BYTES):
            part = stored[first : first + _BOUNCE_BYTES]
            bounce.array[: part.nbytes] = part
            commands = self._device.command_list()
            commands.copy_in(to + first, bounce.address, part.nbytes)
            commands.enqueue()
            self._device.wait()

    def _copy_out(self, source: int, n_bytes: int) -> Array:
        """As `_copy_in`, the other way."""
        found, bounce = np.empty(n_bytes, np.uint8), self._bounce
        for first in range(0, n_bytes, _BOUNCE_BYTES):
            part = found[first : first + _BOUNCE_BYTES]
            commands = self._device.command_list()
            commands.copy_out(bounce.address, source + first, part.nbytes)
            commands.enqueue()
            self._device.wait()
            part[...] = bounce.array[: part.nbytes]
        return found


class _Launches:
    """A kernel, made ready for copies of every size; its arguments are changed in place.

    `kernels`: it, and ahead of it others of one block. `arguments`: what it copies, and its flags.
    `most_blocks`: of a grid. `waits`: each list begins with a wait of the stream's, its command 0.
    """

    def __init__(
        self,
        device: Device,
        kernels: Sequence[Kernel],
        arguments: tuple[ctypes.Structure, ctypes.Structure],
        most_blocks: int,
        *,
        waits: bool = False,
    ) -> None:
        self.waits = waits
        #: For grids of 1, 2, 4 blocks and so on, up to the most. Not tuned.
        self._lists: list[CommandList] = []
        grid = 0
        while grid < most_blocks:
            grid = min(max(1, 2 * grid), most_blocks)
            commands = device.command_list()
            if waits:
                commands.wait_value(0)
            for kernel in kernels:
                blocks = grid if kernel is kernels[-1] else 1
                commands.launch(kernel, blocks, _THREADS, 0, *arguments, overlaps=False)
            self._lists.append(commands)

    @property
    def n_enqueued(self) -> int:
        """How often any of it was."""
        return sum(commands.n_enqueued for commands in self._lists)

    def of(self, n_items: int) -> CommandList:
        """With a thread for each vector of 16 bytes and each pair, as far as grids go."""
        blocks_but_one = max(n_items - 1, 0) // _THREADS
        return self._lists[min(blocks_but_one.bit_length(), len(self._lists) - 1)]


def _may_await(features: Features, worker_bus_id: str) -> bool:
    """Whether kernels on that GPU may wait for the worker's."""
    # On one GPU the worker would not have its turn. Where something is displayed the driver ends
    # kernels that take long, and all that this process has there.
    is_another = "" not in (worker_bus_id, features.bus_id) and worker_bus_id != features.bus_id
    return is_another and not features.ends_long_kernels


def _all_fields(*structs: ctypes.Structure) -> Fields:
    """In their order."""
    return Fields(*((struct, field[0]) for struct in structs for field in struct._fields_))


def _runtime() -> Any:
    """CuPy's, which knows the thread's current device."""
    from cupy.cuda import runtime

    return runtime


@contextlib.contextmanager
def _current_device_kept() -> Iterator[None]:
    """Afterwards, the thread's current device is the one that it was."""
    try:
        runtime = _runtime()
        current = runtime.getDevice()
    except (ImportError, RuntimeError):
        # Whoever opens a device, or uses it, says what is wrong.
        yield
        return
    try:
        yield
    finally:
        runtime.setDevice(current)
