"""Who else uses a GPU, as NVIDIA's management library tells."""

from __future__ import annotations

import ctypes
from typing import Any

from ...errors import DeviceError

_LIBRARY = "libnvidia-ml.so.1"
_FUNCTIONS = (
    "nvmlDeviceGetComputeRunningProcesses_v3",
    "nvmlDeviceGetGraphicsRunningProcesses_v3",
)
#: Processes that are asked for at once.
_MOST = 64


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t of nvml.h, as its functions ending in _v3 have it."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used_bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class Neighbours:
    """Other processes that use one GPU, to compute or to draw. Any thread may ask.

    In a container whose numbers of processes are not the host's, the one that nobody knows is taken
    for this process; what the container hides cannot be counted. `bus_id`: as `Features.bus_id`.
    DeviceError: nobody can tell, as without the library.
    """

    def __init__(self, bus_id: str) -> None:
        try:
            self._library: Any = ctypes.CDLL(_LIBRARY)
            self._find = [getattr(self._library, name) for name in _FUNCTIONS]
        except (OSError, AttributeError) as error:
            raise DeviceError(
                f"who else uses the GPU cannot be told: {error}; it comes with the driver"
            ) from error
        self._handle = ctypes.c_void_p()
        self._check("nvmlInit_v2", self._library.nvmlInit_v2())
        found = self._library.nvmlDeviceGetHandleByPciBusId_v2(
            bus_id.encode(), ctypes.byref(self._handle)
        )
        self._check(f"nvmlDeviceGetHandleByPciBusId {bus_id!r}", found)

    def count(self) -> int:
        """How many there are. DeviceError: nobody can tell."""
        pids: set[int] = set()
        for find in self._find:
            count = ctypes.c_uint(_MOST)
            processes = (_Process * _MOST)()
            self._check("running processes", find(self._handle, ctypes.byref(count), processes))
            pids.update(each.pid for each in processes[: count.value])
        if not pids:
            # This process uses it.
            raise DeviceError(
                "who else uses the GPU cannot be told: the driver names no process, not even this "
                "one; in a container, give it the host's pids"
            )
        return len(pids) - 1

    def _check(self, what: str, status: int) -> None:
        if status:
            raise DeviceError(f"who else uses the GPU cannot be told: {what}: NVML status {status}")
