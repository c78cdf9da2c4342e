"""The real GPU of `moeshm bench kernels`: timed, recorded and described through CuPy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from moeshm.backends.gpu.cupy_device import CupyDevice
from moeshm.backends.gpu.device import Device
from moeshm.dtypes import Array

from .harness import version_of
from .kernels_shapes import peaks_of
from .schema import GpuInfo

_COPY_BYTES = 1 << 30
_COPY_ROUNDS = 10


class CupyGpu:
    """A `Gpu`; its stream is the one of the device that it is made with."""

    def __init__(self, device: CupyDevice) -> None:
        import cupy

        self._cuda: Any = cupy.cuda
        self.device: Device = device
        self._stream = device.stream
        self.stream_handle: int = self._stream.ptr

    def wait(self) -> None:
        """As `Gpu.wait`."""
        self._cuda.runtime.deviceSynchronize()

    def time_us(self, launch: Callable[[], None], rounds: int) -> float:
        """As `Gpu.time_us`."""
        start, end = self._cuda.Event(), self._cuda.Event()
        launch()
        start.record(self._stream)
        for _ in range(rounds):
            launch()
        end.record(self._stream)
        end.synchronize()
        elapsed_ms: float = self._cuda.get_elapsed_time(start, end)
        return elapsed_ms * 1e3 / rounds

    def poison(self, address: int, nbytes: int) -> None:
        """As `Gpu.poison`."""
        self._cuda.runtime.memsetAsync(address, 0xFF, nbytes, self.stream_handle)

    def read(self, address: int, target: Array) -> None:
        """As `Gpu.read`."""
        runtime = self._cuda.runtime
        runtime.memcpy(target.ctypes.data, address, target.nbytes, runtime.memcpyDeviceToHost)

    def record(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """As `Gpu.record`."""
        self._stream.begin_capture()
        try:
            enqueue()
        except BaseException:
            # Its error is the one to tell, not that the recording is of no use any more.
            with contextlib.suppress(RuntimeError):
                self._stream.end_capture()
            raise
        graph = self._stream.end_capture()
        return lambda: graph.launch(self._stream)

    def describe(self) -> GpuInfo:
        """What it is, and what it could do at best."""
        features = self.device.features
        copy_gb_per_s = self._copy_gb_per_s()
        peaks, source = peaks_of(features.name, copy_gb_per_s)
        runtime = self._cuda.runtime
        properties = runtime.getDeviceProperties(runtime.getDevice())
        return GpuInfo(
            name=features.name,
            arch=features.arch,
            multiprocessors=features.multiprocessors,
            total_bytes=features.total_bytes,
            l2_bytes=properties["l2CacheSize"],
            versions={
                "driver": _version(runtime.driverGetVersion()),
                "runtime": _version(runtime.runtimeGetVersion()),
                "cupy": _cupy_version(),
                "torch": version_of("torch"),
                "triton": version_of("triton"),
            },
            copy_gb_per_s=copy_gb_per_s,
            limit_gb_per_s=peaks.gb_per_s,
            limit_tflops=dict(peaks.tflops),
            limit_source=source,
        )

    def _copy_gb_per_s(self) -> float:
        runtime = self._cuda.runtime
        source, target = (self.device.allocate(_COPY_BYTES) for _ in range(2))
        self.poison(source.address, _COPY_BYTES)

        def copy() -> None:
            kind = runtime.memcpyDeviceToDevice
            runtime.memcpyAsync(
                target.address, source.address, _COPY_BYTES, kind, self.stream_handle
            )

        us = self.time_us(copy, _COPY_ROUNDS)
        for memory in (source, target):
            memory.close()
        return 2 * _COPY_BYTES / (us * 1e3)


def _cupy_version() -> str:
    # Its packages have names of their own, one for each CUDA.
    import cupy

    version: str = cupy.__version__
    return version


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
