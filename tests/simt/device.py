"""The SIMT shim as a `Device` of the GPU backend: its memory is the host's, and is counted."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moeshm.backends.gpu.device import (
    Bytes,
    CommandList,
    Features,
    HostMemory,
    Kernel,
    Macros,
    Memory,
    Module,
    OpenedMemory,
    Registration,
)
from moeshm.errors import DeviceError, OutOfDeviceMemory
from tests import simt

#: Both memories start like this, which is NaN in every format.
POISON = 0xFF
_ALIGNMENT = 256
#: What can be exported is made of these.
EXPORT_BYTES = 2 << 20

FEATURES = Features(
    name="SIMT shim",
    arch="simt",
    warp=32,
    multiprocessors=2,
    shared_bytes=227 << 10,
    total_bytes=16 << 30,
    has_mma=True,
    has_overlap=False,
    has_wgmma=False,
)


class SimtMemory:
    """Aligned memory of the host, as a device's and as pinned memory."""

    def __init__(
        self, nbytes: int, kept: dict[int, int], on_close: Callable[[], object] = lambda: None
    ) -> None:
        held = np.full(nbytes + _ALIGNMENT, POISON, np.uint8)
        skipped = -held.ctypes.data % _ALIGNMENT
        self.array: Bytes = held[skipped : skipped + nbytes]
        self.address = self.array.ctypes.data
        self.nbytes = nbytes
        self._kept = kept
        self._on_close = on_close
        kept[self.address] = nbytes

    def close(self) -> None:
        """Whoever copies from or to it afterwards is told."""
        if self._kept.pop(self.address, None):
            self._on_close()
            self.array.fill(POISON)

    def __del__(self) -> None:
        self.close()


class SimtModule:
    """A file that is compiled when one of its kernels is first launched."""

    def __init__(self, device: SimtDevice, file: str, macros: Macros) -> None:
        self._device = device
        self._file = file
        self._macros = macros

    def kernel(self, name: str) -> Kernel:
        """As `Module.kernel`."""
        self._device.loaded.append(f"{self._file} {name}")
        return Kernel(name, self._device.add_module(self))

    @functools.cached_property
    def compiled(self) -> simt.Module:
        """For the host."""
        return simt.compile(self._file, self._macros, self._device.features.warp)


class SimtRegistration:
    """Memory of the host that the device takes for its own."""

    def __init__(self, device: SimtDevice, address: int) -> None:
        self._device = device
        self._address = address
        self.device_address = address + device.shift

    def close(self) -> None:
        """As `Registration.close`."""
        if self._address:
            self._device.unregister(self._address)
            self._address = 0


class SimtOpened:
    """Memory of a device as another process has it: it may stay open when that is freed."""

    def __init__(self, device: SimtDevice, address: int) -> None:
        self._device = device
        self.address = address
        device.opened.append(address)

    def close(self) -> None:
        """As `OpenedMemory.close`."""
        if self.address:
            self._device.opened.remove(self.address)
            self.address = 0


class SimtCommandList:
    """Copies, launches and values of the shim."""

    def __init__(self, device: SimtDevice) -> None:
        self._device = device
        #: The device's methods by name, which tests replace, and their arguments.
        self._commands: list[tuple[str, list[Any]]] = []
        #: Which argument of a copy is the host's address, by its number.
        self._host: dict[int, int] = {}
        #: Numbers of values.
        self._values: set[int] = set()
        self.n_enqueued = 0

    def copy_in(self, to: int, source: int, nbytes: int) -> int:
        """As `CommandList.copy_in`."""
        return self._add_copy("copy_in", [to, source, nbytes], 1)

    def copy_out(self, to: int, source: int, nbytes: int) -> int:
        """As `CommandList.copy_out`."""
        return self._add_copy("copy_out", [to, source, nbytes], 0)

    def _add_copy(self, copy: str, arguments: list[Any], host: int) -> int:
        number = len(self._commands)
        self._commands.append((copy, arguments))
        self._host[number] = host
        return number

    def set_host_address(self, number: int, address: int) -> None:
        """As `CommandList.set_host_address`."""
        self._commands[number][1][self._host[number]] = address

    def launch(
        self,
        kernel: Kernel,
        grid: int,
        block: int,
        shared_bytes: int,
        first: ctypes.Structure,
        second: ctypes.Structure,
        *,
        overlaps: bool = True,
    ) -> None:
        """As `CommandList.launch`."""
        how = [kernel, grid, block, shared_bytes, first, second]
        self._commands.append(("launch", how))
        self._device.overlapping[kernel.name] = overlaps

    def write_value(self, address: int) -> int:
        """As `CommandList.write_value`."""
        return self._add_value("write_value", address)

    def wait_value(self, address: int) -> int:
        """As `CommandList.wait_value`."""
        return self._add_value("wait_value", address)

    def _add_value(self, command: str, address: int) -> int:
        number = len(self._commands)
        self._commands.append((command, [address, 0]))
        self._values.add(number)
        return number

    def set_value(self, number: int, address: int, value: int) -> None:
        """As `CommandList.set_value`."""
        if number not in self._values:
            raise IndexError(f"command {number} has no value")
        self._commands[number][1][:] = address, value

    def enqueue(self, stream: int | None = None) -> None:
        """As `CommandList.enqueue`."""
        self._device.used_streams.append(stream)
        for command, arguments in self._commands:
            self._device.do(getattr(self._device, command), *arguments)
        self.n_enqueued += 1


class SimtDevice:
    """A GPU made of the shim: what it allocates is counted, and limited to `total_bytes`."""

    name = "simt"

    def __init__(self, features: Features = FEATURES) -> None:
        self.features = features
        #: Sizes of what is allocated, by address.
        self._device: dict[int, int] = {}
        self._pinned: dict[int, int] = {}
        #: Sizes of memory that is registered, by address, and of which it is read-only.
        self.registered: dict[int, int] = {}
        self._read_only: set[int] = set()
        #: From the host's addresses of registered memory to those that kernels are to use. Only
        #: kernels that do nothing can have another one than 0.
        self.shift = 0
        self.n_allocations = 0
        #: Every file that was compiled and every kernel that was loaded, in order.
        self.compiled: list[str] = []
        self.loaded: list[str] = []
        self._modules: list[SimtModule] = []
        self.waited_for: list[int] = []
        #: Of each list that was enqueued, the stream; None is the device's own.
        self.used_streams: list[int | None] = []
        #: By kernel, whether it was last added so that it may overlap.
        self.overlapping: dict[str, bool] = {}
        #: Addresses of what is opened of other processes' memory.
        self.opened: list[int] = []

    @property
    def device_bytes(self) -> int:
        """Device memory that is allocated."""
        return sum(self._device.values())

    @property
    def pinned_bytes(self) -> int:
        """Pinned memory that is allocated."""
        return sum(self._pinned.values())

    def use(self) -> None:
        """As `Device.use`."""

    def free_bytes(self) -> int:
        """As `Device.free_bytes`."""
        return self.features.total_bytes - self.device_bytes

    def allocate(self, nbytes: int) -> Memory:
        """As `Device.allocate`."""
        if nbytes > self.free_bytes():
            raise OutOfDeviceMemory(f"{nbytes} bytes of {self.free_bytes()}")
        self.n_allocations += 1
        return SimtMemory(nbytes, self._device, self.on_free)

    def export(self, memory: Memory) -> bytes:
        """As `Device.export`: of what a driver allocates by itself."""
        if memory.nbytes % EXPORT_BYTES:
            raise DeviceError(f"{memory.nbytes} bytes are not of whole {EXPORT_BYTES}")
        return memory.address.to_bytes(64, "little")

    def open_exported(self, handle: bytes) -> OpenedMemory:
        """As `Device.open_exported`, of any device in this process."""
        if len(handle) != 64:
            raise DeviceError(f"{len(handle)} bytes are no handle")
        return SimtOpened(self, int.from_bytes(handle, "little"))

    def pin(self, nbytes: int) -> HostMemory:
        """As `Device.pin`."""
        self.n_allocations += 1
        return SimtMemory(nbytes, self._pinned, self.on_free)

    def register(self, address: int, nbytes: int, *, read_only: bool) -> Registration:
        """As `Device.register`: whole pages that are mapped like that, and none of them twice."""
        if address % mmap.PAGESIZE or nbytes % mmap.PAGESIZE or not nbytes:
            raise DeviceError(f"{nbytes} bytes at {address:#x} are no whole pages")
        for start, size in self.registered.items():
            if address < start + size and start < address + nbytes:
                raise DeviceError(f"{nbytes} bytes at {address:#x} are registered already")
        if modes_of(address, nbytes) != {"r--s" if read_only else "rw-s"}:
            raise DeviceError(f"{nbytes} bytes at {address:#x} are not mapped like that")
        self.registered[address] = nbytes
        if read_only:
            self._read_only.add(address)
        return SimtRegistration(self, address)

    def unregister(self, address: int) -> None:
        """While it is mapped still, or a test fails."""
        nbytes = self.registered.pop(address)
        self._read_only.discard(address)
        assert modes_of(address, nbytes), "unmapped before it was unregistered"

    def copy_in(self, to: int, source: int, nbytes: int) -> None:
        """Enqueued by a command list."""
        _check(self._device, to, nbytes)
        _check({**self._pinned, **self.registered}, source, nbytes)
        ctypes.memmove(to, source, nbytes)

    def copy_out(self, to: int, source: int, nbytes: int) -> None:
        """Enqueued by a command list."""
        writable = {at: n for at, n in self.registered.items() if at not in self._read_only}
        _check({**self._pinned, **writable}, to, nbytes)
        _check(self._device, source, nbytes)
        ctypes.memmove(to, source, nbytes)

    def do(self, command: Callable[..., None], *arguments: Any) -> None:
        """Do, at once, what is enqueued."""
        command(*arguments)

    def launch(
        self,
        kernel: Kernel,
        grid: int,
        block: int,
        shared_bytes: int,
        first: ctypes.Structure,
        second: ctypes.Structure,
    ) -> None:
        """Enqueued by a command list."""
        module = self._modules[kernel.function].compiled
        module.launch(kernel.name, grid, block, shared_bytes, first, second)

    def write_value(self, address: int, value: int) -> None:
        """Enqueued by a command list."""
        _check({**self._device, **self._shifted()}, address, 4)
        ctypes.c_uint32.from_address(address - self.shift).value = value

    def wait_value(self, address: int, value: int) -> None:
        """Enqueued by a command list: there is nobody who could set it later."""
        _check({**self._device, **self._shifted()}, address, 4)
        found = ctypes.c_uint32.from_address(address - self.shift).value
        if (found - value) % (1 << 32) >= 1 << 31:
            raise DeviceError(f"waits for ever for {value} where {found} is")

    def _shifted(self) -> dict[int, int]:
        """What is registered, by the device's addresses."""
        return {at + self.shift: nbytes for at, nbytes in self.registered.items()}

    def compile(self, file: str, macros: Macros) -> Module:
        """As `Device.compile`."""
        self.compiled.append(file)
        return SimtModule(self, file, macros)

    def add_module(self, module: SimtModule) -> int:
        """Its number, by which kernels are launched."""
        self._modules.append(module)
        return len(self._modules) - 1

    def command_list(self) -> CommandList:
        """As `Device.command_list`."""
        return SimtCommandList(self)

    def on_free(self) -> None:
        """Something that was allocated is about to be freed."""

    def wait(self) -> None:
        """As `Device.wait`."""

    def check(self) -> None:
        """As `Device.check`."""

    def wait_for_stream(self, stream: int) -> None:
        """As `Device.wait_for_stream`."""
        self.waited_for.append(stream)


class LazyDevice(SimtDevice):
    """Does what is enqueued only when it is waited for."""

    def __init__(self, features: Features = FEATURES) -> None:
        super().__init__(features)
        self._enqueued: list[Callable[[], None]] = []
        #: How often memory was freed that what is enqueued could still use.
        self.n_freed_early = 0

    def on_free(self) -> None:
        """As `SimtDevice.on_free`."""
        self.n_freed_early += bool(self._enqueued)

    def do(self, command: Callable[..., None], *arguments: Any) -> None:
        """Later, with what the arguments are now."""
        kept = [
            type(each).from_buffer_copy(each) if isinstance(each, ctypes.Structure) else each
            for each in arguments
        ]
        self._enqueued.append(functools.partial(command, *kept))

    def wait(self) -> None:
        """As `Device.wait`."""
        enqueued, self._enqueued = self._enqueued, []
        for command in enqueued:
            command()


class IdleDevice(SimtDevice):
    """A device whose kernels do nothing but tell `on_launch` of themselves, with their first
    struct."""

    def __init__(self, features: Features = FEATURES) -> None:
        super().__init__(features)
        self.on_launch: Callable[[str, Any], object] = lambda _kernel, _first: None

    def launch(
        self,
        kernel: Kernel,
        grid: int,  # noqa: ARG002
        block: int,  # noqa: ARG002
        shared_bytes: int,  # noqa: ARG002
        first: ctypes.Structure,
        second: ctypes.Structure,  # noqa: ARG002
    ) -> None:
        """Enqueued by a command list."""
        self.on_launch(kernel.name, first)


def modes_of(address: int, nbytes: int) -> set[str]:
    """How the pages are mapped, as /proc/PID/maps has it; none unless all of them are."""
    modes, end = set[str](), address + nbytes
    with open("/proc/self/maps") as maps:
        for line in maps:
            bounds, mode = line.split()[:2]
            first, last = (int(each, 16) for each in bounds.split("-"))
            if first <= address < min(last, end):
                modes.add(mode)
                address = last
    return modes if address >= end else set()


def _check(memory: Mapping[int, int], address: int, nbytes: int) -> None:
    """DeviceError unless these bytes are allocated. By several threads, while others allocate."""
    for start, size in list(memory.items()):
        if start <= address and address + nbytes <= start + size:
            return
    raise DeviceError(f"{nbytes} bytes at {address:#x} are not allocated")
