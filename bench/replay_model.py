"""The shapes that a replay plays, random experts for them, and a backend that takes its time."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from moeshm.backends import Backend, Ids, Weights
from moeshm.backends.cpu import CpuBackend
from moeshm.backends.null import NullBackend
from moeshm.checkpoint import ExpertLayer
from moeshm.checkpoint.layer import ExpertWeights
from moeshm.dtypes import DType, FloatArray, narrow
from moeshm.errors import SettingError
from moeshm.layers import LayerInfo

#: The device of whoever computes on none.
CPU = "cpu"
#: Sizes stay multiples of it when they are divided.
_SIZE_STEP = 8
#: A sleep may end this much too late (Linux gives timers 50 µs of slack); the rest is spun.
_SLEEP_MARGIN_NS = 100_000


class Shape(msgspec.Struct, frozen=True):
    """The sizes of a model's MoE layers, all alike."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    n_layers: int

    def scaled(self, divisor: int) -> Shape:
        """hidden_size and intermediate_size divided, rounded down to a multiple of 8."""

        def divided(size: int) -> int:
            return max(_SIZE_STEP, size // divisor // _SIZE_STEP * _SIZE_STEP)

        return msgspec.structs.replace(
            self,
            hidden_size=divided(self.hidden_size),
            intermediate_size=divided(self.intermediate_size),
        )

    def with_layers(self, n_layers: int | None) -> Shape:
        """The first layers only; all of them for None. SettingError: more than there are."""
        if n_layers is None:
            return self
        if not 1 <= n_layers <= self.n_layers:
            raise SettingError(f"layers={n_layers}; {self.name} has 1..{self.n_layers}")
        return msgspec.structs.replace(self, n_layers=n_layers)

    def layer(self, experts: Sequence[int], weight_dtype: DType) -> LayerInfo:
        """A layer that holds these experts, with weights in this format."""
        return LayerInfo(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_experts=self.num_experts,
            top_k=self.top_k,
            experts=tuple(experts),
            weight_dtype=weight_dtype,
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3.5-35b-a3b", 2048, 512, 256, 8, 40),
        Shape("qwen3-30b-a3b", 2048, 768, 128, 8, 48),
        #: The model that comes with moeshm.
        Shape("tiny", 128, 64, 16, 4, 4),
    )
}


class Computed(msgspec.Struct, frozen=True, kw_only=True):
    """What the experts of one side are, and how they are computed."""

    is_null: bool
    seed: int
    #: How many times as long as it would it takes.
    slowdown: float = 1.0
    #: "cpu", "cuda:0".
    device: str = CPU
    #: Of the experts.
    weight_dtype: DType = DType.F32


def make_backend(shape: Shape, experts: Mapping[int, Sequence[int]], computed: Computed) -> Backend:
    """What holds these experts by layer: a null backend, or random weights on the CPU, with one
    thread, or on a GPU.

    Expert i has the same weights in every layer and process, so a process holds one layer's
    weights whatever the number of layers; a GPU holds all. DeviceError: the GPU.
    """
    infos = {number: shape.layer(held, computed.weight_dtype) for number, held in experts.items()}
    if computed.is_null:
        return _paced(NullBackend(infos), computed.slowdown)
    made = functools.partial(random_expert, shape, computed.seed, computed.weight_dtype)
    weights = functools.cache(made)
    layers = {
        number: ExpertLayer(info, [weights(expert) for expert in info.experts])
        for number, info in infos.items()
    }
    if computed.device != CPU:
        return _on_gpu(layers, computed.device)
    return _paced(CpuBackend(layers, threads=1), computed.slowdown)


def _on_gpu(layers: Mapping[int, ExpertLayer], device: str) -> Backend:
    """As `moeshm worker` does."""
    from moeshm.backends.gpu.backend import GpuBackend
    from moeshm.backends.gpu.cupy_device import open_device

    backend = GpuBackend(layers, open_device(device))
    backend.warm_up()
    return backend


def _paced(backend: Backend, slowdown: float) -> Backend:
    return backend if slowdown == 1 else PacedBackend(backend, slowdown)


class PacedBackend:
    """A backend that takes `slowdown` times as long as the one that computes, on the same CPU."""

    name = "paced"

    def __init__(self, backend: Backend, slowdown: float) -> None:
        self.layers = backend.layers
        self._backend = backend
        self._slowdown = slowdown

    def ffn(
        self,
        layer: int,
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
    ) -> None:
        """As `Backend.ffn`; what is added is waited for, mostly asleep."""
        start_ns, used_ns = time.monotonic_ns(), time.thread_time_ns()
        self._backend.ffn(layer, hidden_states, topk_ids, topk_weights, out)
        # Of CPU time, so that what others take of the CPU is not multiplied.
        used_ns = time.thread_time_ns() - used_ns
        wait_until(start_ns + int(used_ns * self._slowdown))


def wait_until(deadline_ns: int) -> None:
    """Return at this time of CLOCK_MONOTONIC: sleep, and spin through the last 0.1 ms."""
    left_ns = deadline_ns - time.monotonic_ns()
    if left_ns > _SLEEP_MARGIN_NS:
        time.sleep((left_ns - _SLEEP_MARGIN_NS) / 1e9)
    while time.monotonic_ns() < deadline_ns:
        pass


def random_expert(shape: Shape, seed: int, dtype: DType, expert: int) -> ExpertWeights:
    """One of a layer's experts, always the same."""
    random = np.random.default_rng([seed, expert])
    hidden, inner = shape.hidden_size, shape.intermediate_size

    def matrix(rows: int, columns: int) -> FloatArray:
        # Of variance 1/columns, so that outputs are neither large nor small.
        values: FloatArray = random.random((rows, columns), np.float32)
        values -= np.float32(0.5)
        values *= np.float32((12 / columns) ** 0.5)
        return values

    gate_up = matrix(2 * inner, hidden)
    return ExpertWeights(
        *(narrow(each, dtype) for each in (gate_up[:inner], gate_up[inner:], matrix(hidden, inner)))
    )
