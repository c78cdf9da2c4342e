"""A slab of one session that a GPU computes in: its memory, and the flag at a call's end."""

from __future__ import annotations

import contextlib
import logging

from ...errors import DeviceError, OutOfDeviceMemory
from ...transport.slab import DONE, FLAGS_BYTES, REFUSED, SLOT_BYTES
from .. import SlabCall
from ._launch import address_of
from .device import Device, Memory, Registration
from .experts import MARGIN_BYTES
from .slab_calls import SlabCalls, SlabData

_log = logging.getLogger(__name__)


def open_slab(device: Device, calls: SlabCalls, memory: memoryview, device_bytes: int) -> GpuSlab:
    """As `SlabUser.open_slab`."""
    device.use()
    with contextlib.ExitStack() as made:
        flags = device.register(address_of(memory), memory.nbytes, read_only=False)
        made.callback(flags.close)
        data, handle = None, b""
        if device_bytes:
            _check_room(device, device_bytes)
            data = device.allocate(device_bytes)
            made.callback(data.close)
            handle = device.export(data)
        slab = GpuSlab(device, calls, memory, flags, data, handle)
        # Not every device writes flags by itself.
        slab.try_flag()
        made.pop_all()
        return slab


class GpuSlab:
    """As `WorkerSlab`.

    `flags`: what the segment's memory is registered by. `data`: memory of the device; None where
    the data is in the segment, behind the flags.
    """

    def __init__(
        self,
        device: Device,
        calls: SlabCalls,
        memory: memoryview,
        flags: Registration,
        data: Memory | None,
        handle: bytes,
    ) -> None:
        self._device = device
        self._calls = calls
        #: It stays mapped for as long as this refers to it.
        self._memory: memoryview | None = memory
        self._closers = [flags.close] if data is None else [flags.close, data.close]
        self._flags = flags.device_address
        self._data = (
            SlabData(self._flags + FLAGS_BYTES, address_of(memory) + FLAGS_BYTES)
            if data is None
            else SlabData(data.address, None)
        )
        self._done = device.command_list()
        self._done_number = self._done.write_value(self._flags + DONE)
        self.handle = handle

    def enqueue(self, call: SlabCall) -> None:
        """As `WorkerSlab.enqueue`. DeviceLost: no call will work any more; else DeviceError."""
        flags = self._flags + call.places.slot * SLOT_BYTES
        self._done.set_value(self._done_number, flags + DONE, call.sequence)
        self._calls.begin(call, self._data, flags + REFUSED, self._done)

    def try_flag(self) -> None:
        """Write a flag as calls do, of a slot that none has used: it stays 0."""
        self._calls.finish(self._done)

    def wait(self) -> None:
        """As `WorkerSlab.wait`."""
        self._calls.wait()

    def close(self) -> None:
        """As `WorkerSlab.close`."""
        if self._memory is None:
            return
        for let_go in (self._calls.wait, *self._closers):
            try:
                let_go()
            except DeviceError as error:
                # A device that is lost has let go of it.
                _log.warning("a slab was not closed as it should be: %s", error)
        self._memory = None


def _check_room(device: Device, device_bytes: int) -> None:
    free = device.free_bytes()
    if device_bytes + MARGIN_BYTES > free:
        raise OutOfDeviceMemory(
            f"a slab needs {device_bytes >> 20} MiB, and {MARGIN_BYTES >> 20} MiB are for kernels, "
            f"but {free >> 20} MiB are free on {device.name} ({device.features.name}); hold fewer "
            "experts there"
        )
