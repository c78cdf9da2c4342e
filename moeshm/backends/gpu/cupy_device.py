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
from .abi import Call, Route
from .device import Bytes, Features, HostMemory, Macros, Memory, Module
from .launching import OverlappingLaunch

#: The first NVRTC that takes another architecture than the one CuPy adds.
_NVRTC_FOR_WGMMA = (12, 9)
_INSTALL = (
    "pip install 'moeshm[cuda13]' ('moeshm[cuda12]' for drivers before 580 and cards before sm_75, "
    "'moeshm[rocm]' for AMD's)"
)
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
        from cupy.cuda import driver, runtime

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
            overlapping = None
            if self.features.has_overlap:
                overlapping = OverlappingLaunch(self.stream.ptr, driver.check_status)
            self._launcher = _Launcher(self.stream.ptr, driver.launchKernel, overlapping)

    def use(self) -> None:
        """As `Device.use`."""
        with self._errors:
            self._runtime.setDevice(self._index)

    def free_bytes(self) -> int:
        """As `Device.free_bytes`."""
        with self._errors:
            free: int = self._runtime.memGetInfo()[0]
        return free

    def allocate(self, nbytes: int) -> Memory:
        """As `Device.allocate`: no pool, so that other processes may map what is exported."""
        with self._errors:
            return _Memory(self._runtime.malloc(nbytes), nbytes, self._runtime.free)

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

    def copy_in(self, to: int, source: int, nbytes: int) -> None:
        """As `Device.copy_in`."""
        kind = self._runtime.memcpyHostToDevice
        with self._errors:
            self._runtime.memcpyAsync(to, source, nbytes, kind, self.stream.ptr)

    def copy_out(self, to: int, source: int, nbytes: int) -> None:
        """As `Device.copy_out`."""
        kind = self._runtime.memcpyDeviceToHost
        with self._errors:
            self._runtime.memcpyAsync(to, source, nbytes, kind, self.stream.ptr)

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
        return _CupyModule(module, self._launcher, self._errors, self._runtime.is_hip)

    def wait(self) -> None:
        """As `Device.wait`."""
        with self._errors:
            self._runtime.streamSynchronize(self.stream.ptr)

    def wait_for_stream(self, stream: int) -> None:
        """As `Device.wait_for_stream`."""
        # The array interface's numbers for the two default streams, which are CUDA's and not HIP's.
        known = {1: self._runtime.streamLegacy, 2: self._runtime.streamPerThread}
        with self._errors:
            self._runtime.streamSynchronize(known.get(stream, stream))

    def explain(self, error: RuntimeError) -> DeviceError:
        """The error as one of ours, with the device's name."""
        where = f"{self.name} ({self.features.name})"
        # The runtime's, HIP's and the driver's name for it.
        if re.search("MemoryAllocation|OutOfMemory|OUT_OF_MEMORY", str(error)):
            return OutOfDeviceMemory(f"{where}: {error}; hold fewer experts there")
        try:
            # After an error that sticks every call fails, this one too.
            self._runtime.deviceSynchronize()
        except RuntimeError:
            return DeviceLost(
                f"{where} is lost: {error}; this process cannot use it any more, start it anew"
            )
        return DeviceError(f"{where}: {error}")


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


class _Launcher:
    """Puts kernels on a stream."""

    def __init__(self, stream: int, launch: Any, overlapping: OverlappingLaunch | None) -> None:
        self._stream = stream
        self._launch = launch
        self._overlapping = overlapping

    def __call__(
        self, function: int, grid: int, block: int, shared_bytes: int, call: Call, route: Route
    ) -> None:
        parameters = (ctypes.c_void_p * 2)(ctypes.addressof(call), ctypes.addressof(route))
        address = ctypes.addressof(parameters)
        if self._overlapping is not None:
            self._overlapping(function, grid, block, shared_bytes, address)
        else:
            how = (grid, 1, 1, block, 1, 1, shared_bytes, self._stream)
            self._launch(function, *how, address, 0)


class _CupyModule:
    """A compiled file."""

    def __init__(self, module: Any, launcher: _Launcher, errors: _Errors, is_hip: bool) -> None:
        self._module = module
        self._launcher = launcher
        self._errors = errors
        # HIP's limit is what every kernel may have.
        self._has_limits = not is_hip
        #: By name: RawKernels, and the dynamic shared memory that each may have by now.
        self._kernels: dict[str, Any] = {}
        self._limits: dict[str, int] = {}

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
        with self._errors:
            function = self._function(kernel, shared_bytes)
            self._launcher(function, grid, block, shared_bytes, call, route)

    def _function(self, kernel: str, shared_bytes: int) -> int:
        if kernel not in self._kernels:
            self._kernels[kernel] = self._module.get_function(kernel)
        found = self._kernels[kernel]
        if self._has_limits and shared_bytes > self._limits.get(kernel, 0):
            found.max_dynamic_shared_size_bytes = shared_bytes
            self._limits[kernel] = shared_bytes
        handle: int = found.kernel.ptr
        return handle


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
    )


def _nvrtc_version() -> tuple[int, int]:
    from cupy.cuda import nvrtc

    major, minor = nvrtc.getVersion()
    return major, minor
