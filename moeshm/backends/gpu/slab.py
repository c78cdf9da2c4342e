"""A slab of one session that a GPU computes in: its memory, and the call that is next."""

from __future__ import annotations

import contextlib
import logging

from ...errors import DeviceError, OutOfDeviceMemory
from ...transport.slab import DONE, FLAGS_BYTES
from .. import BetweenSteps, SlabCall
from ._launch import address_of
from .device import Device, Memory, Registration
from .experts import MARGIN_BYTES
from .slab_calls import Ready, SlabCalls
from .slab_job import SlabMemory

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
        start, host_data = flags.device_address, address_of(memory) + FLAGS_BYTES
        self._where = (
            SlabMemory(start, start + FLAGS_BYTES, host_data)
            if data is None
            else SlabMemory(start, data.address, None)
        )
        #: The call that was prepared last, unless it was begun.
        self._ready: Ready | None = None
        self.handle = handle

    def share_of_step(self, call: SlabCall) -> float:
        """As `WorkerSlab.share_of_step`."""
        return self._calls.share_of_step(call)

    def prepare(self, call: SlabCall) -> None:
        """As `WorkerSlab.prepare`. DeviceLost, DeviceError: as `enqueue`."""
        if self._ready is not None:
            self._calls.give_back(self._ready)
        self._ready = None
        self._ready = self._calls.make_ready(call, self._where)

    def enqueue(self, call: SlabCall, between_steps: BetweenSteps) -> None:
        """As `WorkerSlab.enqueue`. DeviceLost: no call will work any more; else DeviceError."""
        ready = self._ready
        if ready is None or ready.call is not call:
            self.prepare(call)
            ready = self._ready
            assert ready is not None
        self._ready = None
        self._calls.begin(ready, between_steps)

    def try_flag(self) -> None:
        """Write a flag as calls do, of a slot that none has used: it stays 0."""
        commands = self._device.command_list()
        commands.write_value(self._where.flags + DONE)
        self._calls.finish(commands)

    def wait(self) -> None:
        """As `WorkerSlab.wait`."""
        self._calls.wait()

    def close(self) -> None:
        """As `WorkerSlab.close`."""
        if self._memory is None:
            return
        if self._ready is not None:
            self._calls.give_back(self._ready)
        self._ready = None
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
