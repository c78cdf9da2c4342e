"""Memory of others that the device copies from and to by itself: what sessions share."""

from __future__ import annotations

import bisect
import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

from ...dtypes import Array
from ...errors import DeviceError
from ._launch import address_of
from .device import Device, Registration

_log = logging.getLogger(__name__)


class MemoryStats(NamedTuple):
    """How much of the memory it was given a device uses, in bytes as they are mapped."""

    #: That it copies from and to by itself, now.
    registered_bytes: int
    #: That the host copies from and to instead, as the driver refused them; ever since.
    refused_bytes: int


class _Part(NamedTuple):
    """Registered memory: addresses of the host's, and what makes them the device's."""

    begin: int
    end: int
    shift: int
    is_read_only: bool


#: Above every end of a part.
_AFTER_ALL = 1 << 64


class Registered:
    """One memory that is in use; as `UsedMemory`."""

    def __init__(
        self,
        device: Device,
        memory: memoryview,
        parts: dict[_Part, Registration],
        forget: Callable[[_Part], None],
    ) -> None:
        self._device = device
        #: It stays mapped for as long as this refers to it.
        self._memory: memoryview | None = memory
        self._parts = parts
        self._forget = forget
        self.direct_bytes = sum(part.end - part.begin for part in parts)

    def close(self) -> None:
        """As `UsedMemory.close`."""
        while self._parts:
            part, registration = self._parts.popitem()
            self._forget(part)
            try:
                self._device.use()
                registration.close()
            except DeviceError as error:
                # A device that is lost has let go of it.
                _log.warning("shared memory was not unregistered: %s", error)
        self._memory = None


class RegisteredMemory:
    """What is registered with one device, by address. Any thread may use it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.Lock()
        #: In order, and replaced as a whole: `find` needs no lock, as memory that comes or goes
        #: meanwhile is another session's.
        self._parts: tuple[_Part, ...] = ()
        self._refused_bytes = 0

    @property
    def stats(self) -> MemoryStats:
        """The figures now."""
        registered = sum(part.end - part.begin for part in self._parts)
        return MemoryStats(registered, self._refused_bytes)

    def use(self, memory: memoryview) -> Registered:
        """Register it. What is refused is counted and, the first time, logged."""
        begin, size = address_of(memory), memory.nbytes
        parts: dict[_Part, Registration] = {}
        refusal = self._register(begin, size, memory.readonly, parts)
        if refusal is not None:
            # Two halves that are the same pages are not for every driver to take at once.
            for start in (begin, begin + size // 2):
                refusal = self._register(start, size // 2, memory.readonly, parts) or refusal
        used = Registered(self._device, memory, parts, self._forget)
        if used.direct_bytes < size:
            self._count_refused(size - used.direct_bytes, refusal)
        return used

    def find(self, array: Array, is_written: bool) -> tuple[int, int] | None:
        """The host's and the device's address of a contiguous array; None unless all of it is
        registered, and may be written if it is to be."""
        parts = self._parts
        if not parts:
            return None
        address = address_of(array)
        index = bisect.bisect_right(parts, (address, _AFTER_ALL)) - 1
        if index < 0:
            return None
        part = parts[index]
        if address + array.nbytes > part.end or (is_written and part.is_read_only):
            return None
        return address, address + part.shift

    def _register(
        self, begin: int, size: int, is_read_only: bool, parts: dict[_Part, Registration]
    ) -> DeviceError | None:
        """Register one part; why it cannot be, or None."""
        try:
            self._device.use()
            registration = self._device.register(begin, size, read_only=is_read_only)
        except DeviceError as error:
            return error
        part = _Part(begin, begin + size, registration.device_address - begin, is_read_only)
        parts[part] = registration
        with self._lock:
            self._parts = tuple(sorted((*self._parts, part)))
        return None

    def _forget(self, part: _Part) -> None:
        """`find` finds it no more."""
        with self._lock:
            self._parts = tuple(each for each in self._parts if each != part)

    def _count_refused(self, n_bytes: int, why: DeviceError | None) -> None:
        with self._lock:
            is_first = self._refused_bytes == 0
            self._refused_bytes += n_bytes
        level = logging.WARNING if is_first else logging.DEBUG
        _log.log(level, "the host copies activations for the device: %s", why)
