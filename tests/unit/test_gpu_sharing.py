"""Who else uses a GPU, as a management library tells that is played here."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import pytest

from moeshm.backends.gpu import sharing
from moeshm.backends.gpu.sharing import Neighbours
from moeshm.errors import DeviceError

BUS_ID = "0000:1b:00.0"
OTHER, ANOTHER = os.getpid() + 1, os.getpid() + 2
_SUCCESS, _NOT_FOUND, _INSUFFICIENT_SIZE, _GPU_IS_LOST = 0, 6, 7, 15


class _ProcessInfo(ctypes.Structure):
    """nvmlProcessInfo_t, written down anew from nvml.h."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("usedGpuMemory", ctypes.c_ulonglong),
        ("gpuInstanceId", ctypes.c_uint),
        ("computeInstanceId", ctypes.c_uint),
    )


class Library:
    """libnvidia-ml, with one GPU: which pids compute there, and what each function returns."""

    def __init__(self) -> None:
        self.pids: Sequence[int] = (os.getpid(),)
        #: Of these, that draw there.
        self.drawing: Sequence[int] = ()
        self.statuses: dict[str, int] = {}
        self.asked: list[str] = []
        pointer = ctypes.c_void_p
        count = ctypes.POINTER(ctypes.c_uint)
        init = ctypes.CFUNCTYPE(ctypes.c_int)
        by_bus_id = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(pointer))
        find = ctypes.CFUNCTYPE(ctypes.c_int, pointer, count, pointer)
        # As C has them, so that arguments are converted.
        self.nvmlInit_v2 = init(self._init)
        self.nvmlDeviceGetHandleByPciBusId_v2 = by_bus_id(self._by_bus_id)
        self.nvmlDeviceGetComputeRunningProcesses_v3 = find(
            lambda *words: self._find(self.pids, *words)
        )
        self.nvmlDeviceGetGraphicsRunningProcesses_v3 = find(
            lambda *words: self._find(self.drawing, *words)
        )

    def _init(self) -> int:
        self.asked.append("init")
        return self.statuses.get("init", _SUCCESS)

    def _by_bus_id(self, bus_id: bytes, handle: Any) -> int:
        self.asked.append(bus_id.decode())
        handle[0] = 0x7F00_1234_5678
        return self.statuses.get("handle", _SUCCESS)

    def _find(self, pids: Sequence[int], handle: int, count: Any, processes: int) -> int:
        assert handle == 0x7F00_1234_5678, "the handle that was found"
        room = count[0]
        count[0] = len(pids)
        if len(pids) > room:
            return _INSUFFICIENT_SIZE
        infos = ctypes.cast(processes, ctypes.POINTER(_ProcessInfo))
        for index, pid in enumerate(pids):
            infos[index] = _ProcessInfo(pid, 1 << 40, 0xFFFF_FFFF, 0xFFFF_FFFF)
        return self.statuses.get("find", _SUCCESS)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """What is loaded as libnvidia-ml.so.1."""
    made = Library()
    loaded = {"libnvidia-ml.so.1": made}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: loaded[name])
    return made


@pytest.mark.parametrize(
    ("pids", "expected"),
    [
        ((os.getpid(),), 0),
        ((os.getpid(), OTHER), 1),
        ((OTHER, os.getpid(), ANOTHER), 2),
        # Some processes are told of twice.
        ((os.getpid(), OTHER, os.getpid(), OTHER), 1),
        # In a container this process may have another number.
        ((OTHER,), 0),
        ((OTHER, ANOTHER), 1),
    ],
)
def test_others_are_counted(library: Library, pids: Sequence[int], expected: int) -> None:
    library.pids = pids
    assert Neighbours(BUS_ID).count() == expected


def test_who_draws_uses_it_too(library: Library) -> None:
    library.drawing = OTHER, os.getpid()
    assert Neighbours(BUS_ID).count() == 1


def test_where_nobody_is_named_nobody_can_tell(library: Library) -> None:
    """This process is there for sure."""
    library.pids = ()
    with pytest.raises(DeviceError, match="not even this one; in a container, give it the host's"):
        Neighbours(BUS_ID).count()


def test_they_come_and_go(library: Library) -> None:
    neighbours = Neighbours(BUS_ID)
    assert library.asked == ["init", BUS_ID]
    for pids, expected in (((os.getpid(),), 0), ((os.getpid(), OTHER), 1), ((os.getpid(),), 0)):
        library.pids = pids
        assert neighbours.count() == expected
    assert library.asked == ["init", BUS_ID]


@pytest.mark.parametrize(
    ("which", "status", "message"),
    [
        ("init", 9, "nvmlInit_v2: NVML status 9"),
        ("handle", _NOT_FOUND, f"nvmlDeviceGetHandleByPciBusId '{BUS_ID}': NVML status 6"),
    ],
)
def test_a_library_that_finds_no_gpu(
    library: Library, which: str, status: int, message: str
) -> None:
    library.statuses[which] = status
    with pytest.raises(DeviceError, match=f"who else uses the GPU cannot be told: {message}"):
        Neighbours(BUS_ID)


def test_a_library_that_fails_later(library: Library) -> None:
    neighbours = Neighbours(BUS_ID)
    library.statuses["find"] = _GPU_IS_LOST
    with pytest.raises(DeviceError, match="cannot be told: running processes: NVML status 15"):
        neighbours.count()
    library.statuses.clear()
    assert neighbours.count() == 0


def test_more_than_can_be_told_at_once_are_not_nobody(library: Library) -> None:
    library.pids = range(1, 66)
    with pytest.raises(DeviceError, match="running processes: NVML status 7"):
        Neighbours(BUS_ID).count()
    library.pids = range(OTHER, OTHER + 64)
    assert Neighbours(BUS_ID).count() == 63


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_LIBRARY", "libnvidia-ml-of-nobody.so.1")
    message = "cannot be told: libnvidia-ml-of-nobody.so.1: .*; it comes with the driver"
    with pytest.raises(DeviceError, match=message):
        Neighbours(BUS_ID)


def test_a_library_that_is_too_old(library: Library) -> None:
    del library.nvmlDeviceGetComputeRunningProcesses_v3
    with pytest.raises(DeviceError, match=r"nvmlDeviceGetComputeRunningProcesses_v3.*the driver"):
        Neighbours(BUS_ID)
