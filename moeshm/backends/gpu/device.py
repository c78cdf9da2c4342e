"""What the backend needs of a GPU; `cupy_device` has the real ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .abi import Call, Route

Bytes = npt.NDArray[np.uint8]
#: Names and values as the compiler's `-D` takes them.
Macros = Mapping[str, object]


class Features(NamedTuple):
    """What one GPU is and can do, as far as kernels are chosen by it."""

    #: As its driver calls it.
    name: str
    #: "sm_90", "gfx90a".
    arch: str
    #: Lanes of a warp: 32 or 64.
    warp: int
    multiprocessors: int
    #: Most shared memory of a block, static and dynamic together.
    shared_bytes: int
    total_bytes: int
    #: mma.sync of 16-bit floats, from sm_80 on.
    has_mma: bool
    #: A kernel may start before the one ahead of it has ended: from sm_90 on.
    has_overlap: bool
    #: wgmma, of sm_90a only, where the compiler is new enough for it.
    has_wgmma: bool


class Memory(Protocol):
    """Memory of the device; freed by `close`, or with its last reference."""

    address: int
    nbytes: int

    def close(self) -> None:
        """Free it; a second time does nothing."""
        ...


class HostMemory(Protocol):
    """Page-locked memory of the host, which the device copies from and to at full speed."""

    address: int
    array: Bytes

    def close(self) -> None:
        """Free it; a second time does nothing."""
        ...


class Module(Protocol):
    """The kernels of one compiled file."""

    def launch(
        self,
        kernel: str,
        grid: int,
        block: int,
        shared_bytes: int,
        call: Call,
        route: Route,
    ) -> None:
        """Enqueue the kernel on the device's stream.

        `grid` blocks of `block` threads, each with `shared_bytes` of dynamic shared memory. With
        `Features.has_overlap` it may start before the kernel ahead of it has ended, for which
        every kernel waits itself. The two structs may be changed afterwards.
        """
        ...


class Device(Protocol):
    """One GPU with one stream, on which everything is done in order.

    One thread at a time may use it, after `use`; only `allocate`, `pin`, `compile` and what they
    return may be called by others meanwhile. Every method raises OutOfDeviceMemory, DeviceLost when
    no call on the device will work again in this process, else DeviceError.
    """

    #: As the user names it: "cuda:0".
    name: str
    features: Features

    def use(self) -> None:
        """Make it the device of this thread."""
        ...

    def free_bytes(self) -> int:
        """Memory that nobody has, other processes included."""
        ...

    def allocate(self, nbytes: int) -> Memory:
        """Memory of the device, 256-byte aligned, with any content."""
        ...

    def pin(self, nbytes: int) -> HostMemory:
        """Memory of the host to copy from and to."""
        ...

    def copy_in(self, to: int, source: int, nbytes: int) -> None:
        """Enqueue a copy from pinned memory to the device, by their addresses."""
        ...

    def copy_out(self, to: int, source: int, nbytes: int) -> None:
        """Enqueue a copy from the device to pinned memory, by their addresses."""
        ...

    def compile(self, file: str, macros: Macros) -> Module:
        """The kernels of kernels/`file`, compiled for this device, or from the compiler's cache."""
        ...

    def wait(self) -> None:
        """Return when everything that was enqueued is done."""
        ...

    def wait_for_stream(self, stream: int) -> None:
        """Return when another stream's work is done: its handle, or 1 or 2 for the default ones."""
        ...
