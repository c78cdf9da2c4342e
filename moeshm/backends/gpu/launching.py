"""CUDA's launch of kernels that overlap, which CuPy does not have: cuLaunchKernelEx."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

#: CUlaunchAttributeID of cuda.h.
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of whose value this one uses an int."""

    _fields_ = (
        ("id", ctypes.c_uint32),
        ("_padding", ctypes.c_uint32),
        ("value", ctypes.c_int32),
        ("_rest", ctypes.c_uint8 * 60),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("n_attributes", ctypes.c_uint32),
    )


class OverlappingLaunch:
    """Launches on one stream, of kernels that may start before the one ahead of them has ended.

    `check` raises for a status that is not 0. CUDA 11.8's driver or newer, which is as old as the
    first that knows sm_90. OSError: no driver.
    """

    def __init__(self, stream: int, check: Callable[[int], object]) -> None:
        self._launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
        self._launch.argtypes = (ctypes.c_void_p,) * 4
        self._check = check
        self._attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = _Config(
            grid=(1, 1, 1),
            block=(1, 1, 1),
            stream=stream,
            attributes=ctypes.addressof(self._attribute),
            n_attributes=1,
        )

    def __call__(
        self, function: int, grid: int, block: int, shared_bytes: int, parameters: int
    ) -> None:
        """Enqueue `function`, a CUfunction.

        `parameters`: the address of pointers to the kernel's arguments.
        """
        config = self._config
        config.grid[0], config.block[0], config.shared_bytes = grid, block, shared_bytes
        self._check(self._launch(ctypes.addressof(config), function, parameters, None))
