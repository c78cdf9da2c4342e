"""The driver's own functions, by ctypes: what CuPy does not pass on, on ROCm above all."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

from . import _launch

#: Of cuda.h and hip_runtime_api.h alike: kernels may use it, and the device only reads it.
_MAPPED, _READ_ONLY = 2, 8


class _Names(NamedTuple):
    """One vendor's names for what is called."""

    copy_in: str
    copy_out: str
    launch: str
    write_value: str
    wait_value: str
    register: str
    unregister: str
    device_address: str


_CUDA = _Names(
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuLaunchKernel",
    "cuStreamWriteValue32_v2",
    "cuStreamWaitValue32_v2",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemHostGetDevicePointer_v2",
)
#: Not yet run on a card.
_HIP = _Names(
    "hipMemcpyHtoDAsync",
    "hipMemcpyDtoHAsync",
    "hipModuleLaunchKernel",
    "hipStreamWriteValue32",
    "hipStreamWaitValue32",
    "hipHostRegister",
    "hipHostUnregister",
    "hipHostGetDevicePointer",
)


class Driver:
    """The driver that CuPy uses; its errors are what CuPy makes of a status, RuntimeErrors.

    OSError, AttributeError: there is none, or it is too old and lacks a function.
    """

    def __init__(self) -> None:
        from cupy.cuda import driver, runtime

        self._names = _HIP if runtime.is_hip else _CUDA
        # Of HIP whatever CuPy's own module is linked with, wherever that is.
        self._library: Any = ctypes.CDLL(driver.__file__ if runtime.is_hip else "libcuda.so.1")
        self.check_status: Callable[[int], None] = driver.check_status
        address, size, flags = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
        self._register = self._function(self._names.register, address, size, flags)
        self._unregister = self._function(self._names.unregister, address)
        self._device_address = self._function(
            self._names.device_address, ctypes.POINTER(ctypes.c_uint64), address, flags
        )

    def entry_points(self, stream: int, has_overlap: bool) -> _launch.Driver:
        """For command lists on that stream; `has_overlap`: as `Features`."""
        names, library = self._names, self._library
        return _launch.Driver(
            copy_in=_address(library[names.copy_in]),
            copy_out=_address(library[names.copy_out]),
            launch=_address(library[names.launch]),
            # CUDA 11.8's driver has it, which is as old as the first that knows sm_90.
            launch_overlapping=_address(library["cuLaunchKernelEx"]) if has_overlap else 0,
            write_value=_address(library[names.write_value]),
            wait_value=_address(library[names.wait_value]),
            wait_takes_mask=names is _HIP,
            stream=stream,
        )

    def register(self, address: int, nbytes: int, *, read_only: bool) -> int:
        """Page-lock whole pages of the host's memory; where kernels on the device find them.

        `read_only`: they are mapped so, which drivers must be told.
        """
        flags = _MAPPED | (_READ_ONLY if read_only else 0)
        self.check_status(self._register(address, nbytes, flags))
        found = ctypes.c_uint64()
        try:
            self.check_status(self._device_address(ctypes.byref(found), address, 0))
        except RuntimeError:
            self.unregister(address)
            raise
        return found.value

    def unregister(self, address: int) -> None:
        """Undo `register`; nothing may be copied from or to there any more."""
        self.check_status(self._unregister(address))

    def _function(self, name: str, *types: Any) -> Callable[..., int]:
        # Not the library's own: others may have declared their types.
        made: Callable[..., int] = ctypes.CFUNCTYPE(ctypes.c_int, *types)(
            _address(self._library[name])
        )
        return made


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address
