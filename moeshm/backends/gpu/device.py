"""What the backend needs of a GPU; `cupy_device` has the real ones."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import Structure
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

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
    #: Where on the host's PCI bus it is, like "0000:1b:00.0"; empty if its driver does not say.
    bus_id: str = ""
    #: The driver ends kernels that run for seconds, as where something is displayed.
    ends_long_kernels: bool = False


class Memory(Protocol):
    """Memory of the device; freed by `close`, or with its last reference."""

    address: int
    nbytes: int

    def close(self) -> None:
        """Free it; a second time does nothing."""
        ...


class OpenedMemory(Protocol):
    """Memory of a device that another process exported, until `close`."""

    #: Where this process finds its first byte.
    address: int

    def close(self) -> None:
        """Let go of it; a second time does nothing. Nothing may use it any more."""
        ...


class HostMemory(Protocol):
    """Page-locked memory of the host, which the device copies from and to at full speed."""

    address: int
    array: Bytes

    def close(self) -> None:
        """Free it; a second time does nothing."""
        ...


class Registration(Protocol):
    """Memory of the host that is page-locked where it lies, until `close`."""

    #: Where kernels find its first byte.
    device_address: int

    def close(self) -> None:
        """Let go of it, before it is unmapped; a second time does nothing.

        Nothing may be on its way from or to it. DeviceError: the driver knows nothing of it.
        """
        ...


class Kernel(NamedTuple):
    """A kernel on the device, ready to be launched."""

    name: str
    #: Its handle, for the device's own command lists.
    function: int


class Module(Protocol):
    """The kernels of one compiled file."""

    def kernel(self, name: str) -> Kernel:
        """Load it: nothing is left that its first launch would have to do."""
        ...


class CommandList(Protocol):
    """What is asked of a device together, any number of times."""

    def copy_in(self, to: int, source: int, nbytes: int) -> int:
        """Add a copy from pinned or registered memory to the device, by their addresses as the
        host has them; its number."""
        ...

    def copy_out(self, to: int, source: int, nbytes: int) -> int:
        """Add a copy from the device to pinned or registered memory, by their addresses as the
        host has them; its number."""
        ...

    def set_host_address(self, number: int, address: int) -> None:
        """Have the copy of that number use other memory of the host from now on."""
        ...

    def launch(
        self,
        kernel: Kernel,
        grid: int,
        block: int,
        shared_bytes: int,
        first: Structure,
        second: Structure,
        *,
        overlaps: bool = True,
    ) -> None:
        """Add a launch of `grid` blocks of `block` threads.

        Each block has `shared_bytes` of dynamic shared memory. With `Features.has_overlap` the
        kernel may start before the one ahead of it has ended, for which every kernel waits itself,
        unless `overlaps` is False: as where the one ahead is not ours. The two structs, the
        kernel's arguments, are read by `enqueue`, and may be changed afterwards.
        """
        ...

    def write_value(self, address: int) -> int:
        """Add the write of 32 bits, once all before it is done and seen; its number."""
        ...

    def wait_value(self, address: int) -> int:
        """Add that what comes next waits until 32 bits have reached a value, or are less than 2^31
        past it; its number."""
        ...

    def set_value(self, number: int, address: int, value: int) -> None:
        """Have the write or the wait of that number use this address, as the device has it, and
        this value from now on."""
        ...

    def enqueue(self, stream: int | None = None) -> None:
        """Put all of it on the device's stream, in the order in which it was added.

        `stream`: the handle of another one; 0 is the default stream. Where something is refused,
        what comes after it is not enqueued.
        """
        ...

    @property
    def n_enqueued(self) -> int:
        """How often that was done, up to now: also where `enqueue` was interrupted as it ended."""
        ...


class Device(Protocol):
    """One GPU with one stream, on which everything is done in order.

    One thread at a time may use it, after `use`; only `allocate`, `export`, `open_exported`, `pin`,
    `register`, `compile` and what they return, and `command_list`, may be called by others
    meanwhile. Every method raises OutOfDeviceMemory, DeviceLost when no call on the device will
    work again in this process, else DeviceError.
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

    def export(self, memory: Memory) -> bytes:
        """By what other processes open it; it must have been allocated in whole 2 MiB."""
        ...

    def open_exported(self, handle: bytes) -> OpenedMemory:
        """Memory that another process exported, of this GPU or of one that this one reaches."""
        ...

    def pin(self, nbytes: int) -> HostMemory:
        """Memory of the host to copy from and to."""
        ...

    def register(self, address: int, nbytes: int, *, read_only: bool) -> Registration:
        """Page-lock whole pages of the host's memory where they lie, to copy from and to.

        `read_only`: that is how they are mapped. DeviceError: the driver or the device cannot.
        """
        ...

    def command_list(self) -> CommandList:
        """One that is empty."""
        ...

    def compile(self, file: str, macros: Macros) -> Module:
        """The kernels of kernels/`file`, compiled for this device, or from the compiler's cache."""
        ...

    def wait(self) -> None:
        """Return when everything that was enqueued is done."""
        ...

    def check(self) -> None:
        """DeviceLost: what was enqueued has failed. Waits for nothing."""
        ...

    def wait_for_stream(self, stream: int) -> None:
        """Return when another stream's work is done: its handle, or 1 or 2 for the default ones."""
        ...
