"""A CuPy that is made up, with a driver: they note what they are called with, for one card."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moeshm.backends.gpu.abi import Call, Route
from moeshm.backends.gpu.cupy_device import CupyDevice, open_device

STREAM = 4711
A100 = {"name": b"A card", "major": 8, "minor": 0, "sharedMemPerBlockOptin": 163 << 10}
H100 = {**A100, "major": 9, "sharedMemPerBlockOptin": 227 << 10}
MI250 = {"name": b"A card", "gcnArchName": b"gfx90a:sramecc+:xnack-", "warpSize": 64}


#: Functions that register memory, undo that, and tell where kernels find it.
REGISTERING = {
    "cuda": ("cuMemHostRegister_v2", "cuMemHostUnregister", "cuMemHostGetDevicePointer_v2"),
    "hip": ("hipHostRegister", "hipHostUnregister", "hipHostGetDevicePointer"),
}
#: Functions that write a value of 32 bits, and that wait for one.
VALUES = {
    "cuda": ("cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2"),
    "hip": ("hipStreamWriteValue32", "hipStreamWaitValue32"),
}
#: Kernels find registered memory so much higher.
SHIFT = 1 << 40


class CUDARuntimeError(RuntimeError):
    """CuPy's errors are RuntimeErrors, too."""


class FakeCupy:
    """The parts of CuPy that are used, for one card; every call is noted."""

    def __init__(self, properties: dict[str, Any], n_devices: int = 2) -> None:
        self.is_hip = "gcnArchName" in properties
        self.properties = {
            "warpSize": 32,
            "multiProcessorCount": 108,
            "sharedMemPerBlock": 48 << 10,
            "totalGlobalMem": 80 << 30,
            **properties,
        }
        self.n_devices = n_devices
        self.nvrtc_version = (12, 9)
        self.calls: list[tuple[Any, ...]] = []
        self.memory: dict[int, Any] = {}
        #: By function: what it raises.
        self.raises: dict[str, str] = {}
        self.limits: list[tuple[str, int]] = []
        self.modules: list[FakeModule] = []
        #: By function of the driver: the status that it returns.
        self.statuses: dict[str, int] = {}
        #: None for a driver that does not say.
        self.bus_id: str | None = "0000:1B:00.0"
        #: What a look at the stream returns: not ready, at first.
        self.query_status = 600

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Be what `import cupy` gives."""
        modules: dict[str, dict[str, Any]] = {
            "cupy": {"RawModule": self.raw_module},
            "cupy.cuda": {"Stream": lambda **_: SimpleNamespace(ptr=STREAM)},
            "cupy.cuda.runtime": self._runtime(),
            "cupy.cuda.driver": self._driver(),
            "cupy.cuda.nvrtc": {"getVersion": lambda: self.nvrtc_version},
        }
        for name, attributes in modules.items():
            module = ModuleType(name)
            vars(module).update(attributes)
            patch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of each call."""
        return [call[1:] for call in self.calls if call[0] == name]

    def raw_module(self, code: str, options: tuple[str, ...]) -> FakeModule:
        """CuPy's RawModule."""
        self.modules.append(FakeModule(self, code, options))
        return self.modules[-1]

    def _tell_bus_id(self, _index: int) -> str:
        if self.bus_id is None:
            raise RuntimeError("not supported")
        return self.bus_id

    def _runtime(self) -> dict[str, Any]:
        functions: dict[str, Callable[..., Any]] = {
            "getDeviceCount": lambda: self.n_devices,
            "getDeviceProperties": lambda _index: self.properties,
            "deviceGetPCIBusId": self._tell_bus_id,
            "setDevice": lambda _index: None,
            "getDevice": lambda: 0,
            "streamIsCapturing": lambda _stream: False,
            "memGetInfo": lambda: (5 << 30, 80 << 30),
            "malloc": self._allocate,
            "hostAlloc": lambda nbytes, _flags: self._allocate(nbytes),
            "free": self.memory.pop,
            "freeHost": self.memory.pop,
            "ipcGetMemHandle": lambda address: address.to_bytes(64, "little"),
            "ipcOpenMemHandle": lambda handle: int.from_bytes(handle, "little") + SHIFT,
            "ipcCloseMemHandle": lambda _address: None,
            "streamSynchronize": lambda _stream: None,
            "streamQuery": lambda _stream: self.query_status,
        }
        noted = {name: self._noted(name, function) for name, function in functions.items()}
        constants = {
            "is_hip": self.is_hip,
            "hostAllocDefault": 0,
            "streamLegacy": 0 if self.is_hip else 1,
            "streamPerThread": 2,
        }
        return {**noted, **constants}

    def _driver(self) -> dict[str, Any]:
        def check_status(status: int) -> None:
            if status:
                raise CUDARuntimeError(f"CUDA_ERROR_{status}")

        return {"check_status": check_status, "__file__": "driver.so"}

    def _allocate(self, nbytes: int) -> int:
        memory = ctypes.create_string_buffer(nbytes)
        address = ctypes.addressof(memory)
        self.memory[address] = memory
        return address

    def _noted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            if name in self.raises:
                raise CUDARuntimeError(self.raises[name])
            return function(*arguments)

        return call


class FakeCompileError(Exception):
    """CuPy's is no RuntimeError."""


class FakeModule:
    """CuPy's RawModule, of kernels that are numbered."""

    def __init__(self, cupy: FakeCupy, code: str, options: tuple[str, ...]) -> None:
        self.code = code
        self.options = options
        self._cupy = cupy

    def compile(self) -> None:
        """Not if it is told to."""
        if "compile" in self._cupy.raises:
            raise FakeCompileError(self._cupy.raises["compile"])

    def get_function(self, name: str) -> Any:
        """Takes limits of shared memory."""
        cupy = self._cupy

        class Kernel:
            kernel = SimpleNamespace(ptr=len(name))
            shared_size_bytes = 1000

            def __setattr__(self, attribute: str, value: int) -> None:
                assert attribute == "max_dynamic_shared_size_bytes"
                cupy.limits.append((name, value))

        cupy.calls.append(("get_function", name))
        if "get_function" in cupy.raises:
            raise CUDARuntimeError(cupy.raises["get_function"])
        return Kernel()


def opened(
    patch: pytest.MonkeyPatch, properties: dict[str, Any], name: str = "auto"
) -> tuple[FakeCupy, CupyDevice]:
    """The card, and the device that uses it."""
    cupy = FakeCupy(properties)
    cupy.install(patch)
    patch.setattr(
        ctypes,
        "CDLL",
        lambda name: {"libcuda.so.1": cuda_driver, "driver.so": hip_driver}[name](cupy),
    )
    return cupy, open_device(name)


class Library:
    """A driver's functions: each notes what it is called with and returns what it is told to.

    `names`: of the two copies, of the launch without attributes, of what registers memory, undoes
    that, and tells where kernels find it, of what writes a value, and of what waits for one.
    """

    def __init__(self, cupy: FakeCupy, names: Sequence[str]) -> None:
        self._functions: dict[str, Any] = {}
        self._cupy = cupy
        u32, u64 = ctypes.c_uint32, ctypes.c_uint64
        for name in names[:2]:
            self._add(name, self._copy, u64, u64, ctypes.c_size_t, u64)
        self._add(names[2], self._launch, u64, *[u32] * 7, u64, u64, u64)
        self._add("cuLaunchKernelEx", self._launch_overlapping, *[u64] * 4)
        self._add(names[3], lambda *how: how, u64, ctypes.c_size_t, u32)
        self._add(names[4], lambda *how: how, u64)
        self._add(names[5], self._device_address, u64, u64, u32)
        on_value = (u64, u64, u32, u32)
        self._add(names[6], lambda *how: how, *on_value)
        self._add(names[7], lambda *how: how, *on_value, *((u32,) if cupy.is_hip else ()))

    def __getitem__(self, name: str) -> Any:
        return self._functions[name]

    def _add(self, name: str, function: Callable[..., tuple[Any, ...]], *types: Any) -> None:
        def call(*arguments: int) -> int:
            self._cupy.calls.append((name, *function(*arguments)))
            return self._cupy.statuses.get(name, 0)

        self._functions[name] = ctypes.CFUNCTYPE(ctypes.c_int, *types)(call)

    def _copy(self, to: int, source: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        ctypes.memmove(to, source, nbytes)
        return nbytes, stream

    def _device_address(self, result: int, address: int, flags: int) -> tuple[Any, ...]:
        ctypes.c_uint64.from_address(result).value = address + SHIFT
        return address, flags

    def _launch(self, function: int, *how: int) -> tuple[Any, ...]:
        *sizes, stream, parameters, extra = how
        return function, sizes, stream, *read(parameters), extra

    def _launch_overlapping(
        self, config: int, function: int, parameters: int, extra: int
    ) -> tuple[Any, ...]:
        sizes = list((ctypes.c_uint32 * 7).from_address(config))
        stream = ctypes.c_uint64.from_address(config + 32).value
        return function, sizes, stream, *read(parameters), extra


def cuda_driver(cupy: FakeCupy) -> Library:
    """libcuda.so.1."""
    copies = ("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2")
    return Library(cupy, (*copies, "cuLaunchKernel", *REGISTERING["cuda"], *VALUES["cuda"]))


def hip_driver(cupy: FakeCupy) -> Library:
    """What CuPy's own module is linked with."""
    copies = ("hipMemcpyHtoDAsync", "hipMemcpyDtoHAsync")
    names = (*copies, "hipModuleLaunchKernel", *REGISTERING["hip"], *VALUES["hip"])
    return Library(cupy, names)


def read(parameters: int) -> tuple[int, int]:
    """Of a kernel's arguments, the call's tokens and where the route's tiles are."""
    call, route = (ctypes.c_uint64 * 2).from_address(parameters)
    return Call.from_address(call).n_tokens, Route.from_address(route).tiles
