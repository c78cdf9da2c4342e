"""Measures one shape and format in a process of its own, all contenders in turns.

    python -m moeshm.bench.kernels_program SETUP

SETUP is a `Setup` as JSON. It prints one `Line` after the other, so that what was measured before a
device's error that ends the process is known, and who caused it.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from moeshm.backends.gpu.cupy_device import open_device
from moeshm.dtypes import Array, DType
from moeshm.errors import MoeshmError
from moeshm.layers import LayerInfo

from . import harness, kernels_shapes, kernels_torch, kernels_triton
from .harness import CellSamples, Plan
from .kernels_contender import Contender, Entry, Gpu, Prepared
from .kernels_gpu import CupyGpu
from .kernels_moeshm import Moeshm
from .kernels_shapes import KERNEL_SHAPES, Peaks
from .kernels_torch import TorchGrouped
from .kernels_triton import TritonMoe
from .kernels_work import CALLS, Cell, Verdict, Work, judge
from .schema import GpuInfo, KernelRow

CONTENDERS: Mapping[str, Entry] = {
    "moeshm": Entry(Moeshm, lambda _work: None),
    "torch-grouped": Entry(TorchGrouped, kernels_torch.absence),
    "triton": Entry(TritonMoe, kernels_triton.absence),
}
#: A repeat's launches take about as long together.
_REPEAT_US = 20_000.0
_MAX_ROUNDS = 50


class Setup(msgspec.Struct):
    """What one process measures."""

    shape: str
    dtype: str
    #: Contenders by number of tokens, in the order in which these are measured.
    cells: list[tuple[int, list[str]]]
    #: As MOESHM_KERNELS, for moeshm.
    kernels: str
    repeats: int
    seed: int


class FoundGpu(msgspec.Struct, tag=True):
    """The first line."""

    gpu: GpuInfo


class Refused(msgspec.Struct, tag=True):
    """The only line where nothing can be measured."""

    why: str


class Began(msgspec.Struct, tag=True):
    """Whose work the device has from now on."""

    contender: str
    n_tokens: int


class Measured(msgspec.Struct, tag=True):
    """A contender is done with a number of tokens."""

    row: KernelRow


Line = FoundGpu | Refused | Began | Measured
Say = Callable[[Line], None]


def main(words: Sequence[str]) -> None:
    """Measure what the words ask for."""
    setup = msgspec.json.decode(words[0], type=Setup)
    try:
        gpu = CupyGpu(open_device("auto"))
        found = gpu.describe()
    except MoeshmError as error:
        _print(Refused(str(error)))
        return
    _print(FoundGpu(found))
    work = Work(KERNEL_SHAPES[setup.shape], DType.parse(setup.dtype), setup.seed)
    measure(setup, gpu, work, found, CONTENDERS, _print)


def _print(line: Line) -> None:
    print(msgspec.json.encode(line).decode(), flush=True)


def measure(
    setup: Setup,
    gpu: Gpu,
    work: Work,
    found: GpuInfo,
    entries: Mapping[str, Entry],
    say: Say,
) -> None:
    """Say a `Measured` for each contender of each cell. Raises what has broken the device."""

    @functools.cache
    def contender(name: str) -> Contender:
        return entries[name].make(gpu, work, setup.kernels)

    for n_tokens, names in setup.cells:
        cell = work.cell(n_tokens)
        runner = _Runner(setup, gpu, cell, say)
        for name in names:
            runner.prepare(name, entries[name].absence(work), functools.partial(contender, name))
        runner.time()
        for name in names:
            row = runner.row(name)
            add_limits(row, work.info, cell.n_distinct, found)
            say(Measured(row))
        runner.close()


class _Runner:
    """The contenders of one cell: prepared, checked, and timed in turns."""

    def __init__(self, setup: Setup, gpu: Gpu, cell: Cell, say: Say) -> None:
        self._setup = setup
        self._gpu = gpu
        self._cell = cell
        self._say = say
        self._prepared: dict[str, Prepared] = {}
        self._about: dict[str, dict[str, Any]] = {}
        self._samples: dict[str, list[CellSamples]] = {}

    def prepare(self, name: str, absence: str | None, make: Callable[[], Contender]) -> None:
        """Make a contender ready and check what it computes."""
        self._samples[name], self._about[name] = [], {}
        if absence is not None:
            self._samples[name].append(CellSamples(name, error=absence))
            return

        def check() -> None:
            prepared = self._prepared[name] = make().prepare(self._cell)
            verdict = self._judge(prepared)
            about = {"plan": prepared.plan, **verdict._asdict()}
            if prepared.measure_host is not None:
                about |= prepared.measure_host()._asdict()
            self._about[name] = about

        self._attempt(name, check)

    def time(self) -> None:
        """Each contender once per repeat, in an order shuffled anew each time."""
        rounds: dict[str, int] = {}

        def run(name: str) -> bool:
            def sample() -> None:
                launch = self._prepared[name].launch
                if name not in rounds:
                    once_us = max(self._gpu.time_us(launch, 1), 1.0)
                    rounds[name] = min(_MAX_ROUNDS, math.ceil(_REPEAT_US / once_us))
                us = self._gpu.time_us(launch, rounds[name])
                n_calls = rounds[name] * CALLS
                duration_ns = round(us * 1e3 * rounds[name])
                self._samples[name].append(CellSamples(name, n_calls, [duration_ns]))

            return self._attempt(name, sample)

        plan = Plan(0, 0, self._setup.repeats, 0.0, None, self._setup.seed)
        ready = [name for name in self._about if self._about[name]]
        harness.interleave(ready, plan, run)
        for name in ready:
            self._attempt(name, functools.partial(self._check_again, name))

    def _check_again(self, name: str) -> None:
        """ValueError: what was timed is not what was checked before, as where inputs were freed."""
        before, after = self._about[name]["relative_error"], self._judge(self._prepared[name])
        if after.relative_error > 2 * before + 1e-6:
            raise ValueError(
                f"error {after.relative_error:.2g} after it was timed, {before:.2g} before"
            )

    def row(self, name: str) -> KernelRow:
        """What was found out about a contender."""
        timing = harness.summarise(self._samples[name])
        timing.pop("p99_us", None)  # a repeat is one duration
        timing["repeats"] = self._setup.repeats
        return KernelRow(
            contender=name,
            shape=self._setup.shape,
            dtype=self._setup.dtype,
            n_tokens=self._cell.n_tokens,
            **timing,
            **self._about[name],
        )

    def close(self) -> None:
        """Give back what the contenders took."""
        for prepared in self._prepared.values():
            prepared.close()

    def _attempt(self, name: str, do: Callable[[], None]) -> bool:
        """False when it failed and the device still works; raises when it does not."""
        self._say(Began(name, self._cell.n_tokens))
        try:
            do()
        except Exception as error:
            words = f"{type(error).__name__}: {error}".splitlines()[0]
            self._samples[name].append(CellSamples(name, error=words))
            self._gpu.wait()
            return False
        return True

    def _judge(self, prepared: Prepared) -> Verdict:
        first, second = (self._output(prepared) for _ in range(2))
        return judge(first, second, self._cell)

    def _output(self, prepared: Prepared) -> Array:
        output = np.empty_like(self._cell.hidden_states)
        self._gpu.poison(prepared.out, output.nbytes)
        prepared.launch()
        self._gpu.wait()
        self._gpu.read(prepared.out, output)
        return output


def add_limits(row: KernelRow, info: LayerInfo, n_distinct: float, found: GpuInfo) -> None:
    """Fill in what the device could do at best, and what the row's time makes of it."""
    peaks = Peaks(found.limit_gb_per_s, found.limit_tflops)
    limit = kernels_shapes.limit_of(info, row.n_tokens, n_distinct, peaks)
    row.distinct_experts = n_distinct
    row.limit_us, row.limit_reason = limit
    row.goal_us = kernels_shapes.goal_us(found.name, row.shape, row.dtype, row.n_tokens)
    if row.p50_us is not None:
        row.limit_percent = 100 * limit.us / row.p50_us
        n_bytes = kernels_shapes.call_bytes(info, row.n_tokens, n_distinct)
        row.gb_per_s = harness.gb_per_s(n_bytes, row.p50_us)
        row.tflops = kernels_shapes.call_flops(info, row.n_tokens) / (row.p50_us * 1e6)


if __name__ == "__main__":
    main(sys.argv[1:])
