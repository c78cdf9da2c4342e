"""The engine's GPU of `moeshm bench device-calls`, through CuPy: its arrays, stream and copies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from moeshm.backends.gpu.cupy_device import open_device
from moeshm.dtypes import Array

from .kernels_gpu import CupyGpu
from .schema import GpuInfo


class CupyEngine:
    """As `device_calls_client.Engine`. DeviceError: the GPU is not there."""

    def __init__(self, name: str) -> None:
        self._device = open_device(name)
        import cupy

        self._cupy: Any = cupy
        self._runtime: Any = cupy.cuda.runtime
        self.name = self._device.name
        self.stream = self._device.stream
        # `compute` goes on the current one.
        self.stream.use()

    def put(self, array: Array) -> Any:
        """As `Engine.put`."""
        made = self._cupy.asarray(array)
        self.stream.synchronize()
        return made

    def read(self, values: Any) -> Array:
        """As `Engine.read`."""
        found: Array = values.get()
        self.stream.synchronize()
        return found

    def describe(self) -> GpuInfo:
        """As `Engine.describe`."""
        return CupyGpu(self._device).describe()

    def worker_device(self, wanted: str) -> str:
        """As `Engine.worker_device`."""
        return choose_worker_device(wanted, self.name, self._runtime.getDeviceCount())

    def stream_ns(self, begin: Callable[[], Any]) -> tuple[int, Any]:
        """As `Engine.stream_ns`."""
        event = self._cupy.cuda.Event
        start, end = event(), event()
        start.record(self.stream)
        begun = begin()
        end.record(self.stream)
        end.synchronize()
        return round(self._cupy.cuda.get_elapsed_time(start, end) * 1e6), begun

    def peer_copy(self, worker_device: str, n_bytes: int) -> Callable[[], None]:
        """As `Engine.peer_copy`."""
        near = self._device.allocate(n_bytes)
        # Opening one makes it the thread's current device.
        other = open_device(worker_device)
        far = other.allocate(n_bytes)
        self._allow_peers(other.name)
        self._device.use()
        copy, kind = self._runtime.memcpyAsync, self._runtime.memcpyDeviceToDevice
        stream = self.stream

        def copy_both_ways() -> None:
            copy(far.address, near.address, n_bytes, kind, stream.ptr)
            copy(near.address, far.address, n_bytes, kind, stream.ptr)
            stream.synchronize()

        return copy_both_ways

    def _allow_peers(self, other: str) -> None:
        """Without it a copy between two GPUs goes through the host's memory."""
        runtime = self._runtime
        mine, theirs = (int(name.partition(":")[2]) for name in (self.name, other))
        for own, peer in ((mine, theirs), (theirs, mine)):
            if own != peer and runtime.deviceCanAccessPeer(own, peer):
                runtime.setDevice(own)
                # Opening a slab has allowed it already.
                with contextlib.suppress(RuntimeError):
                    runtime.deviceEnablePeerAccess(peer)


def choose_worker_device(wanted: str, engine_device: str, n_devices: int) -> str:
    """The worker's GPU: the wanted one; for "auto" the first that is not the engine's, if there is
    one, else the engine's."""
    if wanted != "auto":
        return wanted
    vendor = engine_device.partition(":")[0]
    every = [f"{vendor}:{number}" for number in range(n_devices)]
    return next((name for name in every if name != engine_device), engine_device)
