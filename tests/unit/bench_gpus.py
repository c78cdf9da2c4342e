"""A GPU that is none, and contenders that recite, for `moeshm bench kernels`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from moeshm.backends.gpu.device import Device
from moeshm.backends.reference import reference_ffn
from moeshm.bench import kernels_program
from moeshm.bench.kernels_contender import Entry, Gpu, HostTimes, Prepared
from moeshm.bench.kernels_program import Line, Measured, Setup
from moeshm.bench.kernels_shapes import KernelShape
from moeshm.bench.kernels_work import Cell, Work
from moeshm.bench.replay_model import Shape
from moeshm.bench.schema import GpuInfo, KernelRow
from moeshm.dtypes import Array, DType, narrow
from moeshm.layers import Activation
from tests.simt.device import SimtDevice

H100 = "NVIDIA H100 80GB HBM3"
TINY = KernelShape(Shape("tiny", 64, 64, 8, 2, 1), (1, 4))
#: Sizes that every contender takes.
SMALL = KernelShape(Shape("small", 256, 128, 8, 2, 1))
BIASED = KernelShape(Shape("biased", 64, 64, 8, 2, 1), (3,), Activation.SWIGLU_CLAMPED, True)
GPU = GpuInfo(
    name=H100,
    arch="sm_90",
    multiprocessors=132,
    total_bytes=80 << 30,
    l2_bytes=50 << 20,
    versions={"cupy": "14.2.0", "triton": None},
    copy_gb_per_s=3000.0,
    limit_gb_per_s=3350.0,
    limit_tflops={"bf16": 989.0},
    limit_source="datasheet",
)


class ShimGpu:
    """A `Gpu` whose device is the shim, and whose clock says what it is told to."""

    stream_handle = 0

    def __init__(self) -> None:
        self.device: Device = SimtDevice()
        self.us_of_launch = 160.0
        self.rounds: list[int] = []
        self.broken: RuntimeError | None = None

    def wait(self) -> None:
        if self.broken is not None:
            raise self.broken

    def time_us(self, launch: Callable[[], None], rounds: int) -> float:
        launch()
        self.rounds.append(rounds)
        return self.us_of_launch

    def record(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        return enqueue

    def poison(self, address: int, nbytes: int) -> None:
        ctypes.memset(address, 0xFF, nbytes)

    def read(self, address: int, target: Array) -> None:
        ctypes.memmove(target.ctypes.data, address, target.nbytes)


class Recited:
    """A contender that writes the reference's rows, times `scale`."""

    def __init__(self, work: Work, scale: float = 1.0) -> None:
        self._work = work
        self._scale = scale
        self.launches = self.closed = 0

    def prepare(self, cell: Cell) -> Prepared:
        out = np.zeros_like(cell.hidden_states)
        values = reference_ffn(self._work.layer, cell.hidden_states, *cell.routings[-1])
        result = narrow((values * self._scale).astype(np.float32), self._work.info.weight_dtype)

        def launch() -> None:
            self.launches += 1
            out[...] = result

        def close() -> None:
            self.closed += 1

        return Prepared(
            launch, out.ctypes.data, "recited", close, lambda: HostTimes(9.0, 30.0, 20.0, 2.0)
        )


class Run(NamedTuple):
    gpu: Gpu
    lines: list[Line]

    def rows(self) -> dict[tuple[int, str], KernelRow]:
        found = [line.row for line in self.lines if isinstance(line, Measured)]
        return {(row.n_tokens, row.contender): row for row in found}


def run(
    entries: Mapping[str, Entry],
    *,
    shape: KernelShape = TINY,
    dtype: DType = DType.BF16,
    n_tokens: tuple[int, ...] = (4,),
    gpu: Gpu | None = None,
) -> Run:
    work = Work(shape, dtype, seed=5)
    names = list(entries)
    cells = [(n, names) for n in n_tokens]
    setup = Setup(shape.sizes.name, str(dtype), cells, "auto", repeats=3, seed=5)
    done = Run(gpu or ShimGpu(), [])
    kernels_program.measure(setup, done.gpu, work, GPU, entries, done.lines.append)
    return done


def entry(make: Callable[[Work], Any]) -> Entry:
    return Entry(lambda _gpu, work, _kernels: make(work), lambda _work: None)
