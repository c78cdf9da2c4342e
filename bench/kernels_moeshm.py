"""moeshm as a contender: `GpuBackend.ffn` on arrays that are on the device, recorded as a graph."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np

from moeshm.backends.gpu import choice
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.gpu.choice import Shape, Size
from moeshm.backends.gpu.device import Device, Memory
from moeshm.dtypes import Array
from moeshm.settings import parse_kernels

from .kernels_contender import Gpu, HostTimes, Prepared
from .kernels_work import Cell, Work

#: Passes over the calls of a cell for each of the host's times; the first is not counted.
_PASSES = 4
#: Calls that are timed after pauses, besides the first.
_N_RESTED = 3
_REST_S = 0.5
_LAYER = 0


class Unwaiting:
    """A device that need not be waited for, so that a backend's calls can be recorded."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._waits = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def wait(self) -> None:
        """As `Device.wait`, unless it need not."""
        if self._waits:
            self._device.wait()

    @contextlib.contextmanager
    def unwaited(self) -> Iterator[None]:
        """Meanwhile `wait` returns at once."""
        self._waits = False
        try:
            yield
        finally:
            self._waits = True


class OnDevice(NamedTuple):
    """An array that was copied to the device."""

    memory: Memory
    shape: tuple[int, ...]
    typestr: str

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.typestr,
            "data": (self.memory.address, False),
            "version": 3,
        }


def to_device(device: Device, array: Array) -> OnDevice:
    """A copy of it that is there when this returns."""
    memory, pinned = device.allocate(array.nbytes), device.pin(array.nbytes)
    pinned.array[:] = array.reshape(-1).view(np.uint8)
    commands = device.command_list()
    commands.copy_in(memory.address, pinned.address, array.nbytes)
    commands.enqueue()
    device.wait()
    pinned.close()
    return OnDevice(memory, array.shape, array.dtype.str)


class Moeshm:
    """The layer on the GPU backend, with the kernels that `moeshm worker` would use."""

    def __init__(self, gpu: Gpu, work: Work, kernels: str) -> None:
        self._gpu = gpu
        self._work = work
        self._wanted = parse_kernels(kernels)
        self._device = Unwaiting(gpu.device)
        device = cast(Device, self._device)
        self._backend = GpuBackend({_LAYER: work.layer}, device, self._wanted)
        self._backend.warm_up()

    def prepare(self, cell: Cell) -> Prepared:
        """One graph of all calls."""
        # Before anything else is asked for so many tokens.
        first_call_us, *rested = self._calls_after_rest_us(cell)
        device = self._gpu.device
        hidden_states = to_device(device, cell.hidden_states)
        out = to_device(device, cell.hidden_states)
        routings = [
            tuple(to_device(device, array) for array in routing) for routing in cell.routings
        ]
        calls = [(_LAYER, hidden_states, ids, weights, out) for ids, weights in routings]
        ffn: Callable[..., None] = self._backend.ffn

        def enqueue() -> None:
            for call in calls:
                ffn(*call)

        enqueue()
        with self._device.unwaited():
            launch = self._gpu.record(enqueue)

        def close() -> None:
            for array in (hidden_states, out, *(each for pair in routings for each in pair)):
                array.memory.close()

        def measure_host() -> HostTimes:
            with self._device.unwaited():
                enqueue_us = _median_us(ffn, calls, self._gpu.wait)
            rested_call_us = float(np.median(rested))
            return HostTimes(self._call_us(cell), first_call_us, rested_call_us, enqueue_us)

        return Prepared(launch, out.memory.address, self._plan(cell), close, measure_host)

    def _calls_after_rest_us(self, cell: Cell) -> list[float]:
        """Of some calls, each after a pause in which the device slows down its clock."""
        ffn, out = self._backend.ffn, np.zeros_like(cell.hidden_states)
        # So that its pages are there.
        out.fill(0)
        elapsed_us: list[float] = []
        for _ in range(1 + _N_RESTED):
            time.sleep(_REST_S)
            call = (_LAYER, cell.hidden_states, *cell.routings[0], out)
            elapsed_us.append(_elapsed_us(ffn, call))
        return elapsed_us

    def _call_us(self, cell: Cell) -> float:
        out = np.empty_like(cell.hidden_states)
        calls = [(_LAYER, cell.hidden_states, *routing, out) for routing in cell.routings]
        return _median_us(self._backend.ffn, calls, self._gpu.wait)

    def _plan(self, cell: Cell) -> str:
        """The launches of one call: kernels, blocks and threads."""
        info = self._work.info
        shape = Shape.of(info, self._work.has_bias)
        size = Size(cell.n_tokens, info.top_k, info.num_experts)
        features = self._gpu.device.features
        plan = choice.plan(shape, size, info.weight_dtype, features, self._wanted)
        steps = [f"{step.file} {step.kernel} {step.grid}x{step.block}" for step in plan.steps]
        macros = {f"{name}={value}" for step in plan.steps for name, value in step.macros}
        return ", ".join([*steps, *sorted(macros)])


def _median_us(
    do: Callable[..., None], calls: list[tuple[Any, ...]], wait: Callable[[], None]
) -> float:
    """Of one call of `do`, with `wait` after each pass."""
    elapsed_us: list[float] = []
    for _ in range(_PASSES):
        elapsed_us += [_elapsed_us(do, call) for call in calls]
        wait()
    return float(np.median(elapsed_us[len(calls) :]))


def _elapsed_us(do: Callable[..., None], call: tuple[Any, ...]) -> float:
    start_ns = time.perf_counter_ns()
    do(*call)
    return (time.perf_counter_ns() - start_ns) / 1e3
