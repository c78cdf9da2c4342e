"""The SIMT shim as a `Device` of the GPU backend: its memory is the host's, and is counted."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping

import numpy as np

from moeshm.backends.gpu.abi import Call, Route
from moeshm.backends.gpu.device import Bytes, Features, HostMemory, Macros, Memory
from moeshm.backends.gpu.device import Module as DeviceModule
from moeshm.errors import DeviceError, OutOfDeviceMemory
from tests import simt

#: Both memories start like this, which is NaN in every format.
POISON = 0xFF
_ALIGNMENT = 256

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

    def __init__(self, nbytes: int, kept: dict[int, int]) -> None:
        held = np.full(nbytes + _ALIGNMENT, POISON, np.uint8)
        skipped = -held.ctypes.data % _ALIGNMENT
        self.array: Bytes = held[skipped : skipped + nbytes]
        self.address = self.array.ctypes.data
        self.nbytes = nbytes
        self._kept = kept
        kept[self.address] = nbytes

    def close(self) -> None:
        """Whoever copies from or to it afterwards is told."""
        if self._kept.pop(self.address, None):
            self.array.fill(POISON)

    def __del__(self) -> None:
        self.close()


class SimtModule:
    """Launches at once."""

    def __init__(self, module: simt.Module) -> None:
        self._module = module

    def launch(
        self,
        kernel: str,
        grid: int,
        block: int,
        shared_bytes: int,
        call: Call,
        route: Route,
    ) -> None:
        """As `Module.launch`."""
        self._module.launch(kernel, grid, block, shared_bytes, call, route)


class SimtDevice:
    """A GPU made of the shim: what it allocates is counted, and limited to `total_bytes`."""

    name = "simt"

    def __init__(self, features: Features = FEATURES) -> None:
        self.features = features
        #: Sizes of what is allocated, by address.
        self._device: dict[int, int] = {}
        self._pinned: dict[int, int] = {}
        self.n_allocations = 0
        #: Every compilation, in order.
        self.compiled: list[str] = []
        self.waited_for: list[int] = []

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
        return SimtMemory(nbytes, self._device)

    def pin(self, nbytes: int) -> HostMemory:
        """As `Device.pin`."""
        self.n_allocations += 1
        return SimtMemory(nbytes, self._pinned)

    def copy_in(self, to: int, source: int, nbytes: int) -> None:
        """As `Device.copy_in`."""
        _check(self._device, to, nbytes)
        _check(self._pinned, source, nbytes)
        ctypes.memmove(to, source, nbytes)

    def copy_out(self, to: int, source: int, nbytes: int) -> None:
        """As `Device.copy_out`."""
        _check(self._pinned, to, nbytes)
        _check(self._device, source, nbytes)
        ctypes.memmove(to, source, nbytes)

    def compile(self, file: str, macros: Macros) -> DeviceModule:
        """As `Device.compile`."""
        self.compiled.append(file)
        return SimtModule(simt.compile(file, macros, self.features.warp))

    def wait(self) -> None:
        """As `Device.wait`."""

    def wait_for_stream(self, stream: int) -> None:
        """As `Device.wait_for_stream`."""
        self.waited_for.append(stream)


class IdleModule:
    """Tells of its launches, and computes nothing."""

    def __init__(self, device: IdleDevice) -> None:
        self._device = device

    def launch(
        self,
        kernel: str,
        grid: int,  # noqa: ARG002
        block: int,  # noqa: ARG002
        shared_bytes: int,  # noqa: ARG002
        call: Call,
        route: Route,  # noqa: ARG002
    ) -> None:
        """As `Module.launch`."""
        self._device.on_launch(kernel, call)


class IdleDevice(SimtDevice):
    """A device whose kernels do nothing but tell `on_launch` of themselves."""

    def __init__(self, features: Features = FEATURES) -> None:
        super().__init__(features)
        self.on_launch: Callable[[str, Call], object] = lambda _kernel, _call: None

    def compile(self, file: str, macros: Macros) -> DeviceModule:  # noqa: ARG002
        """As `Device.compile`."""
        self.compiled.append(file)
        return IdleModule(self)


def _check(memory: Mapping[int, int], address: int, nbytes: int) -> None:
    """DeviceError unless these bytes are allocated. By several threads, while others allocate."""
    for start, size in list(memory.items()):
        if start <= address and address + nbytes <= start + size:
            return
    raise DeviceError(f"{nbytes} bytes at {address:#x} are not allocated")
