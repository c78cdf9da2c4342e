"""GPUs of NVIDIA and AMD through CuPy, which is imported when one is opened and not before."""

from __future__ import annotations

import contextlib
import ctypes
import re
from types import TracebackType
from typing import Any

import numpy as np

from ...errors import DeviceError, DeviceLost, OutOfDeviceMemory
from ...kernels import source
from . import _launch
from .device import (
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
from .driver import Driver

#: The first NVRTC that takes another architecture than the one CuPy adds.
_NVRTC_FOR_WGMMA = (12, 9)
_INSTALL = (
    "pip install 'moeshm[cuda13]' ('moeshm[cuda12]' for drivers before 580 and cards before sm_75, "
    "'moeshm[rocm]' for AMD's)"
)
#: CUDA's and HIP's status for work that is not done.
_NOT_READY = 600
_NAME = re.compile(r"(?P<kind>cuda|hip)(:(?P<index>\d+))?")


def open_device(name: str) -> CupyDevice:
    """The GPU of that name; "auto" is the first that CuPy sees.

    DeviceError: there is none, CuPy is not installed, or it is built for the other vendor's.
    """
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        raise DeviceError(f"no CuPy for device {name} ({error}); {_INSTALL}") from error
    kind = "hip" if runtime.is_hip else "cuda"
    found = _NAME.fullmatch(kind if name == "auto" else name)
    if found is None:
        raise DeviceError(f"device {name!r}; choose cpu, auto, cuda:N or hip:N")
    if found["kind"] != kind:
        raise DeviceError(f"device {name}, but the CuPy here is built for {kind}; {_INSTALL}")
    index = int(found["index"] or 0)
    try:
        count = runtime.getDeviceCount()
    except RuntimeError as error:
        raise DeviceError(f"no GPU for device {name}: {error}") from error
    if index >= count:
        known = ", ".join(f"{kind}:{each}" for each in range(count)) or "none"
        raise DeviceError(f"no GPU {kind}:{index}; CuPy sees {known}")
    return CupyDevice(index)


class _Errors:
    """Turns CuPy's errors into ours, for everything that is done with the device."""

    def __init__(self, device: CupyDevice) -> None:
        self._device = device

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # CuPy's errors are RuntimeErrors.
        if isinstance(error, RuntimeError) and not isinstance(error, DeviceError):
            raise self._device.explain(error) from error


class CupyDevice:
    """One GPU, with a stream of its own."""

    def __init__(self, index: int) -> None:
        import cupy
        from cupy.cuda import runtime

        self._index = index
        self._runtime = runtime
        self._raw_module = cupy.RawModule
        self.name = f"{'hip' if runtime.is_hip else 'cuda'}:{index}"
        self._errors = _Errors(self)
        self.features = Features("a GPU", "", 0, 0, 0, 0, False, False, False)
        with self._errors:
            runtime.setDevice(index)
            self.features = _features(runtime, index)
            #: CuPy's, for whoever records or times what is on it.
            self.stream: Any = cupy.cuda.Stream(non_blocking=True)
        self._stream: int = self.stream.ptr
        try:
            self._driver = Driver()
            self._entry_points = self._driver.entry_points(self._stream, self.features.has_overlap)
        except (OSError, AttributeError) as error:
            remedy = "install a CuPy for it" if runtime.is_hip else "install a newer one"
            raise DeviceError(
                f"the driver of {self.name} lacks what moeshm calls ({error}); {remedy}"
            ) from error

    def use(self) -> None:
        """As `Device.use`."""
        # Every call comes here and to `wait`: a `with` would be a good part of what they cost.
        try:
            self._runtime.setDevice(self._index)
        except RuntimeError as error:
            raise self.explain(error) from error

    def free_bytes(self) -> int:
        """As `Device.free_bytes`."""
        with self._errors:
            free: int = self._runtime.memGetInfo()[0]
        return free

    def allocate(self, nbytes: int) -> Memory:
        """As `Device.allocate`: no pool, so that other processes may map what is exported."""
        with self._errors:
            return _Memory(self._runtime.malloc(nbytes), nbytes, self._runtime.free)

    def export(self, memory: Memory) -> bytes:
        """As `Device.export`."""
        with self._errors:
            handle: bytes = self._runtime.ipcGetMemHandle(memory.address)
        return handle

    def open_exported(self, handle: bytes) -> OpenedMemory:
        """As `Device.open_exported`."""
        with self._errors:
            # CuPy has the driver enable access to another GPU's memory.
            address = self._runtime.ipcOpenMemHandle(handle)
        return _Memory(address, 0, self._runtime.ipcCloseMemHandle)

    def pin(self, nbytes: int) -> HostMemory:
        """As `Device.pin`."""
        try:
            with self._errors:
                address = self._runtime.hostAlloc(nbytes, self._runtime.hostAllocDefault)
        except OutOfDeviceMemory as error:
            raise OutOfDeviceMemory(
                f"{nbytes} bytes of the host's memory cannot be page-locked for {self.name}: "
                f"{error.__cause__}; free some of it"
            ) from error
        return _HostMemory(address, nbytes, self._runtime.freeHost)

    def register(self, address: int, nbytes: int, *, read_only: bool) -> Registration:
        """As `Device.register`."""
        try:
            with self._errors:
                device_address = self._driver.register(address, nbytes, read_only=read_only)
        except DeviceLost:
            raise
        except DeviceError as error:
            how = "read-only " if read_only else ""
            raise DeviceError(
                f"{nbytes} bytes of {how}shared memory cannot be page-locked for {self.name}: "
                f"{error.__cause__}"
            ) from error
        return _Registration(self, address, device_address)

    def unregister(self, address: int) -> None:
        """What `Registration.close` does."""
        with self._errors:
            self._driver.unregister(address)

    def command_list(self) -> CommandList:
        """As `Device.command_list`."""
        return _CommandList(self, _launch.CommandList(self._entry_points))

    def compile(self, file: str, macros: Macros) -> Module:
        """As `Device.compile`; the cache is CuPy's, in CUPY_CACHE_DIR."""
        definitions = {"WARP": self.features.warp, **macros}
        options = ["-std=c++17", *(f"-D{name}={value}" for name, value in definitions.items())]
        if file.endswith("_wgmma.cu"):
            options.append("--gpu-architecture=sm_90a")
        module = self._raw_module(code=source(file), options=tuple(options))
        with self._errors:
            try:
                module.compile()
            except RuntimeError:
                raise
            except Exception as error:  # CuPy's own; or the system's, of hipcc or the cache
                raise DeviceError(f"{file} does not compile for {self.name}: {error}") from error
        # HIP's limit is what every kernel may have.
        most_shared_bytes = None if self._runtime.is_hip else self.features.shared_bytes
        return _CupyModule(module, self._errors, most_shared_bytes)

    def wait(self) -> None:
        """As `Device.wait`."""
        try:
            self._runtime.streamSynchronize(self._stream)
        except RuntimeError as error:
            raise self.explain(error) from error

    def check(self) -> None:
        """As `Device.check`."""
        status = self._runtime.streamQuery(self._stream)
        if status not in (0, _NOT_READY):
            raise self.explain(RuntimeError(f"status {status}"))

    def wait_for_stream(self, stream: int) -> None:
        """As `Device.wait_for_stream`."""
        # The array interface's numbers for the two default streams, which are CUDA's and not HIP's.
        known = {1: self._runtime.streamLegacy, 2: self._runtime.streamPerThread}
        with self._errors:
            self._runtime.streamSynchronize(known.get(stream, stream))

    def check_status(self, status: int, command: str) -> None:
        """Raise what the driver's status stands for, unless it is 0, success."""
        try:
            self._driver.check_status(status)
        except RuntimeError as error:
            raise self.explain(error, f"{command}: ") from error

    def explain(self, error: RuntimeError, doing: str = "") -> DeviceError:
        """The error as one of ours, with the device's name."""
        where = f"{self.name} ({self.features.name})"
        # The runtime's, HIP's and the driver's name for it.
        if re.search("MemoryAllocation|OutOfMemory|OUT_OF_MEMORY", str(error)):
            return OutOfDeviceMemory(f"{where}: {doing}{error}; hold fewer experts there")
        # After an error that sticks every call fails, this one too. Not one that waits: an engine's
        # streams may wait for what only the caller's next steps bring.
        if self._runtime.streamQuery(self._stream) not in (0, _NOT_READY):
            return DeviceLost(
                f"{where} is lost: {doing}{error}; this process cannot use it any more, start it "
                "anew"
            )
        return DeviceError(f"{where}: {doing}{error}")


class _Memory:
    def __init__(self, address: int, nbytes: int, free: Any) -> None:
        self.address = address
        self.nbytes = nbytes
        self._free = free

    def close(self) -> None:
        """As `Memory.close`."""
        free, self._free = self._free, None
        if free is not None:
            # A device that is lost takes its memory along.
            with contextlib.suppress(RuntimeError):
                free(self.address)

    def __del__(self) -> None:
        self.close()


class _HostMemory(_Memory):
    def __init__(self, address: int, nbytes: int, free: Any) -> None:
        super().__init__(address, nbytes, free)
        memory = (ctypes.c_uint8 * nbytes).from_address(address)
        self.array: Bytes = np.frombuffer(memoryview(memory), np.uint8)


class _Registration:
    def __init__(self, device: CupyDevice, address: int, device_address: int) -> None:
        self._device = device
        self._address: int | None = address
        self.device_address = device_address

    def close(self) -> None:
        """As `Registration.close`."""
        address, self._address = self._address, None
        if address is not None:
            self._device.unregister(address)


class _CommandList:
    """Commands, and their names for errors."""

    def __init__(self, device: CupyDevice, commands: _launch.CommandList) -> None:
        self._device = device
        self._commands = commands
        self._names: list[str] = []

    def copy_in(self, to: int, source: int, nbytes: int) -> int:
        """As `CommandList.copy_in`."""
        self._names.append("copy to the device")
        return self._commands.copy_in(to, source, nbytes)

    def copy_out(self, to: int, source: int, nbytes: int) -> int:
        """As `CommandList.copy_out`."""
        self._names.append("copy from the device")
        return self._commands.copy_out(to, source, nbytes)

    def set_host_address(self, number: int, address: int) -> None:
        """As `CommandList.set_host_address`."""
        self._commands.set_host_address(number, address)

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
        self._commands.launch(kernel.function, grid, block, shared_bytes, first, second, overlaps)
        self._names.append(kernel.name)

    def write_value(self, address: int) -> int:
        """As `CommandList.write_value`."""
        self._names.append("write of a value")
        return self._commands.write_value(address)

    def wait_value(self, address: int) -> int:
        """As `CommandList.wait_value`."""
        self._names.append("wait for a value")
        return self._commands.wait_value(address)

    def set_value(self, number: int, address: int, value: int) -> None:
        """As `CommandList.set_value`."""
        self._commands.set_value(number, address, value)

    def enqueue(self, stream: int | None = None) -> None:
        """As `CommandList.enqueue`."""
        refused = self._commands.enqueue(stream)
        if refused is not None:
            index, status = refused
            self._device.check_status(status, self._names[index])

    @property
    def n_enqueued(self) -> int:
        """As `CommandList.n_enqueued`."""
        return self._commands.n_enqueued


class _CupyModule:
    """A compiled file."""

    def __init__(self, module: Any, errors: _Errors, most_shared_bytes: int | None) -> None:
        self._module = module
        self._errors = errors
        self._most_shared_bytes = most_shared_bytes

    def kernel(self, name: str) -> Kernel:
        """As `Module.kernel`."""
        with self._errors:
            found = self._module.get_function(name)
            if self._most_shared_bytes is not None:
                # As much as there is, whatever the sizes of calls will ask for.
                dynamic_bytes = self._most_shared_bytes - found.shared_size_bytes
                found.max_dynamic_shared_size_bytes = dynamic_bytes
            return Kernel(name, found.kernel.ptr)


def _features(runtime: Any, index: int) -> Features:
    properties = runtime.getDeviceProperties(index)
    shared_bytes = max(properties["sharedMemPerBlock"], properties.get("sharedMemPerBlockOptin", 0))
    if runtime.is_hip:
        arch, capability = properties["gcnArchName"].decode().partition(":")[0], (0, 0)
    else:
        capability = (properties["major"], properties["minor"])
        arch = f"sm_{capability[0]}{capability[1]}"
    return Features(
        name=properties["name"].decode(),
        arch=arch,
        warp=properties["warpSize"],
        multiprocessors=properties["multiProcessorCount"],
        shared_bytes=shared_bytes,
        total_bytes=properties["totalGlobalMem"],
        has_mma=capability >= (8, 0),
        has_overlap=capability >= (9, 0),
        has_wgmma=capability == (9, 0) and _nvrtc_version() >= _NVRTC_FOR_WGMMA,
        bus_id=_bus_id(runtime, index),
        ends_long_kernels=bool(properties.get("kernelExecTimeoutEnabled", 0)),
    )


def _bus_id(runtime: Any, index: int) -> str:
    try:
        return str(runtime.deviceGetPCIBusId(index)).lower()
    except RuntimeError:
        return ""


def _nvrtc_version() -> tuple[int, int]:
    from cupy.cuda import nvrtc

    major, minor = nvrtc.getVersion()
    return major, minor
