"""Experts on the CPU: rows grouped by expert, weights in their stored format, float32 sums."""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from ..checkpoint.layer import ExpertLayer, ExpertWeights
from ..dtypes import Array, FloatArray, dtype_of, narrow, widen
from ..layers import LayerInfo
from . import Ids, Weights
from .cpu_activation import activate
from .cpu_matmul import multiply

#: Experts' output rows held at once; longer calls are cut into parts, so that a call needs at
#: most this many times hidden_size float32 values.
MAX_ROWS = 8192
#: Experts that take no more than this as float32, all layers together, are widened once.
SMALL_MODEL_BYTES = 32 << 20
#: So few tokens of a small model are fastest one by one.
FEW_TOKENS = 8
#: Multiply-adds per expert below which handing experts to other threads costs more than it
#: gains: a hand-over and the fight for the interpreter take 0.05 to 0.3 ms.
PARALLEL_MIN = 1 << 20

Slots = npt.NDArray[np.intp]


class CpuBackend:
    """Computes experts with NumPy and its BLAS, on the calling thread and `threads - 1` others;
    by default on as many as there are usable CPUs.

    Weights stay where they are, memory-mapped, in the stored dtype; a block at a time is
    widened to float32 in the cache (`cpu_matmul`). Only layers that are small together, with all
    the model's experts, held or not, are widened once, here. `ffn` may be called by several
    threads at a time, also while another adds or removes experts: it is a `GrowingBackend`.

    Threads take whole experts; so that they do not fight over the BLAS's own, set
    OPENBLAS_NUM_THREADS=1 before NumPy is imported when `threads` is more than one. Every run
    of a call gives the same bits, whatever `threads` is. In another batch a token's result may
    differ in its last bits, because BLAS sums in another order for another number of rows; the
    weighted sum over its experts always goes slot by slot. ValueError: `threads` below 1.
    """

    name = "cpu"

    def __init__(self, layers: Mapping[int, ExpertLayer], threads: int | None = None) -> None:
        if threads is None:
            threads = len(os.sched_getaffinity(0))
        if threads < 1:
            raise ValueError(f"threads={threads}; it must be at least 1")
        self._layers: dict[int, _Layer] = {}
        is_small = sum(map(_bytes_as_float32, layers.values())) <= SMALL_MODEL_BYTES
        for number, layer in layers.items():
            self._layers[number] = (_SmallLayer if is_small else _Layer)(layer.info)
            self._layers[number].add(self._layers[number].prepare(layer))
        self.layers: Mapping[int, LayerInfo] = {n: layer.info for n, layer in layers.items()}
        self._changing = threading.Lock()
        self._team = _Team(threads)

    def ffn(
        self,
        layer: int,
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
    ) -> None:
        """As `Backend.ffn`."""
        held = self._layers[layer]
        dtype = dtype_of(out)
        # Infinities and NaN of the input belong into the output, not into a warning.
        with np.errstate(all="ignore"):
            x = widen(hidden_states)
            if isinstance(held, _SmallLayer) and len(x) <= FEW_TOKENS:
                result = np.empty(x.shape, np.float32)
                for row in zip(x, topk_ids, topk_weights, result, strict=True):
                    held.one_token(*row)
                narrow(result, dtype, out=out)
                return
            step = max(1, MAX_ROWS // topk_ids.shape[1])
            for token in range(0, len(x), step):
                part = slice(token, token + step)
                result = self._sum(held, x[part], topk_ids[part], topk_weights[part])
                narrow(result, dtype, out=out[part])

    def add(self, layer: int, experts: ExpertLayer) -> list[int]:
        """As `GrowingBackend.add`."""
        with self._changing:
            held = self._layers.get(layer)
            if held is None:
                # However many layers come, no more is widened than a small model has.
                n_bytes = sum(
                    _bytes_as_float32(each)
                    for each in self._layers.values()
                    if isinstance(each, _SmallLayer)
                ) + _bytes_as_float32(experts)
                held = (_SmallLayer if n_bytes <= SMALL_MODEL_BYTES else _Layer)(experts.info)
                # Without experts still, which harms nobody should preparing them fail.
                self._layers[layer] = held
        # Takes long, and whoever removes some must not wait for it.
        weights = held.prepare(experts)
        with self._changing:
            return held.add(weights)

    def remove(self, layer: int, slots: Sequence[int]) -> None:
        """As `GrowingBackend.remove`."""
        with self._changing:
            self._layers[layer].remove(slots)

    def _sum(self, held: _Layer, x: FloatArray, ids: Ids, weights: Weights) -> FloatArray:
        """The weighted sum of the experts' outputs, float32 [n_tokens, hidden_size]."""
        n_tokens, top_k = ids.shape
        outputs = np.empty((n_tokens * top_k, x.shape[1]), np.float32)
        empty, groups = _by_expert(ids)
        outputs[empty] = 0

        def compute(group: tuple[int, Slots]) -> None:
            local_id, slots = group
            if n_tokens == 1:
                outputs[slots] = held.experts[local_id](x[0])
            else:
                outputs[slots] = held.experts[local_id](x[slots // top_k].T).T

        n_rows = len(outputs) - len(empty)
        self._team.run(compute, groups, n_rows * held.multiply_adds)
        if len(empty):
            weights = np.where(ids < 0, np.float32(0), weights)
        # One product per token, so that no token's sum depends on how many others there are.
        slots_of_token = outputs.reshape(n_tokens, top_k, -1)
        summed: FloatArray = np.matmul(weights[:, np.newaxis], slots_of_token)
        return summed[:, 0]


class _Layer:
    """The experts of one layer in their stored formats, by slot.

    Read by other threads while one changes it: an entry is complete before its slot is known.
    """

    def __init__(self, info: LayerInfo) -> None:
        self.info = info
        self.multiply_adds = 3 * info.hidden_size * info.intermediate_size
        self.experts: dict[int, _Expert] = {}

    def prepare(self, layer: ExpertLayer) -> list[ExpertWeights]:
        """The experts' weights as `add` takes them."""
        return [self._prepare(layer.expert(local_id)) for local_id in range(len(layer))]

    def add(self, weights: list[ExpertWeights]) -> list[int]:
        """Take the experts in; the lowest slots that are free."""
        free = (slot for slot in itertools.count() if slot not in self.experts)
        slots = list(itertools.islice(free, len(weights)))
        self._fill(slots, weights)
        self.experts.update(
            (slot, _Expert(self.info, each)) for slot, each in zip(slots, weights, strict=True)
        )
        return slots

    def remove(self, slots: Sequence[int]) -> None:
        """Forget the experts in these slots."""
        for slot in slots:
            del self.experts[slot]

    def _prepare(self, weights: ExpertWeights) -> ExpertWeights:
        return weights

    def _fill(self, slots: list[int], weights: list[ExpertWeights]) -> None:
        """Note what else is kept of the experts."""


class _SmallLayer(_Layer):
    """The experts of one layer in float32, with a short cut for a single token."""

    def __init__(self, info: LayerInfo) -> None:
        super().__init__(info)
        self._gate_up: dict[int, Array] = {}
        self._down: dict[int, Array] = {}
        self._gate_bias: FloatArray | None = None
        self._up_bias: FloatArray | None = None
        self._down_bias: FloatArray | None = None

    def _prepare(self, weights: ExpertWeights) -> ExpertWeights:
        return _widened(weights)

    def _fill(self, slots: list[int], weights: list[ExpertWeights]) -> None:
        self._gate_bias = _bias_table(self._gate_bias, slots, [w.gate_bias for w in weights])
        self._up_bias = _bias_table(self._up_bias, slots, [w.up_bias for w in weights])
        self._down_bias = _bias_table(self._down_bias, slots, [w.down_bias for w in weights])
        for slot, each in zip(slots, weights, strict=True):
            self._gate_up[slot] = _fused(each.gate_proj, each.up_proj)[0][0]
            self._down[slot] = each.down_proj

    def remove(self, slots: Sequence[int]) -> None:
        """As `_Layer.remove`."""
        super().remove(slots)
        for slot in slots:
            del self._gate_up[slot], self._down[slot]

    def one_token(self, x: FloatArray, ids: Ids, weights: Weights, result: FloatArray) -> None:
        """Fill one row of the result: a BLAS call for each matrix, everything else at once."""
        used = ids.tolist()
        if min(used) < 0:
            weights = weights[ids >= 0]
            used = [local_id for local_id in used if local_id >= 0]
        inner = self.info.intermediate_size
        gate_up = np.empty((len(used), 2 * inner), np.float32)
        for local_id, row in zip(used, gate_up, strict=True):
            np.dot(self._gate_up[local_id], x, row)
        gate, up = gate_up[:, :inner], gate_up[:, inner:]
        if self._gate_bias is not None:
            gate += self._gate_bias[used]
        if self._up_bias is not None:
            up += self._up_bias[used]
        outputs = np.empty((len(used), len(x)), np.float32)
        activated = activate(self.info, gate, up)
        for local_id, row, output in zip(used, activated, outputs, strict=True):
            np.dot(self._down[local_id], row, output)
        if self._down_bias is not None:
            outputs += self._down_bias[used]
        np.dot(weights, outputs, result)


class _Expert:
    """One expert applied to activations, [features] or [features, n_rows]."""

    def __init__(self, info: LayerInfo, weights: ExpertWeights) -> None:
        self._info = info
        self._weights = weights
        self.gate_up, self._is_interleaved = _fused(weights.gate_proj, weights.up_proj)

    def __call__(self, x: FloatArray) -> FloatArray:
        """The expert's output, [hidden_size] or [hidden_size, n_rows]."""
        gate, up = self._project_in(x)
        _add_bias(gate, self._weights.gate_bias)
        _add_bias(up, self._weights.up_bias)
        output = np.empty((self._info.hidden_size, *x.shape[1:]), np.float32)
        multiply(self._weights.down_proj, activate(self._info, gate, up), output)
        _add_bias(output, self._weights.down_bias)
        return output

    def _project_in(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        inner = self._info.intermediate_size
        gate_up = np.empty((2 * inner, *x.shape[1:]), np.float32)
        gate, up = gate_up[:inner], gate_up[inner:]
        outputs = (gate_up,) if len(self.gate_up) == 1 else (gate, up)
        for matrix, output in zip(self.gate_up, outputs, strict=True):
            multiply(matrix, x, output)
        return (gate_up[0::2], gate_up[1::2]) if self._is_interleaved else (gate, up)


class _Team:
    """The calling thread and its helpers, which take items until none is left."""

    def __init__(self, threads: int) -> None:
        self._n_helpers = threads - 1
        self._pool: ThreadPoolExecutor | None = None
        self._pool_pid = 0

    def run(
        self,
        compute: Callable[[tuple[int, Slots]], None],
        groups: Sequence[tuple[int, Slots]],
        multiply_adds: int,
    ) -> None:
        """Call `compute` once for every group, here or, if it is worth it, on all threads."""
        n_helpers = min(self._n_helpers, len(groups) - 1)
        if n_helpers < 1 or multiply_adds < PARALLEL_MIN * len(groups):
            for group in groups:
                compute(group)
            return
        # Longest first, so that the threads finish together.
        queue = deque(sorted(groups, key=lambda group: -len(group[1])))
        # The pool forgets a task a moment after its result is there. Emptied at the end, this
        # keeps that task from holding the call's arrays.
        job = [compute]

        def work() -> None:
            with np.errstate(all="ignore"):
                while queue:
                    try:
                        group = queue.popleft()
                    except IndexError:
                        return
                    job[0](group)

        helpers = [self._helpers().submit(work) for _ in range(n_helpers)]
        try:
            work()
        finally:
            queue.clear()
            wait([helper for helper in helpers if not helper.cancel()])
            job.clear()
        for helper in helpers:
            if not helper.cancelled():
                helper.result()

    def _helpers(self) -> ThreadPoolExecutor:
        # After fork() the child has the pool but not its threads.
        if self._pool is None or self._pool_pid != os.getpid():
            self._pool = ThreadPoolExecutor(self._n_helpers, thread_name_prefix="moeshm-cpu")
            self._pool_pid = os.getpid()
        return self._pool


def _by_expert(ids: Ids) -> tuple[Slots, list[tuple[int, Slots]]]:
    """The empty slots, and for each expert that is used its id and its slots.

    A slot is its index in the flattened `ids`; an expert's slots are in rising order.
    """
    flat = ids.ravel()
    if len(ids) == 1:
        used = [(local_id, np.array([slot])) for slot, local_id in enumerate(flat.tolist())]
        return np.flatnonzero(flat < 0), [group for group in used if group[0] >= 0]
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    n_empty = int(np.searchsorted(ordered, 0))
    starts = np.flatnonzero(np.diff(ordered[n_empty:], prepend=np.int32(-1))) + n_empty
    groups = np.split(order, starts)[1:]
    return order[:n_empty], list(zip(ordered[starts].tolist(), groups, strict=True))


def _fused(gate: Array, up: Array) -> tuple[tuple[Array, ...], bool]:
    """gate_proj and up_proj as one matrix [2 * intermediate_size, hidden_size] of the same
    memory, and whether their rows alternate in it; as they are if memory does not allow that.

    The one matrix does not keep its memory alive: hold on to the two arrays.
    """
    inner, hidden = gate.shape
    item = gate.itemsize
    if gate.dtype == up.dtype and gate.strides == up.strides:
        distance = up.ctypes.data - gate.ctypes.data
        shape = (2 * inner, hidden)
        if gate.flags.c_contiguous and distance == gate.nbytes:
            return (as_strided(gate, shape, gate.strides, writeable=False),), False
        if distance == item and gate.strides == (2 * item, 2 * inner * item):
            strides = (item, 2 * inner * item)
            return (as_strided(gate, shape, strides, writeable=False),), True
    return (gate, up), False


def _widened(weights: ExpertWeights) -> ExpertWeights:
    """The same expert in float32, up_proj right behind gate_proj so that they fuse."""

    def wide_bias(bias: Array | None) -> FloatArray | None:
        return None if bias is None else widen(bias)

    inner, hidden = weights.gate_proj.shape
    gate_up = np.empty((2 * inner, hidden), np.float32)
    np.concatenate([widen(weights.gate_proj), widen(weights.up_proj)], out=gate_up)
    return ExpertWeights(
        gate_proj=gate_up[:inner],
        up_proj=gate_up[inner:],
        down_proj=np.ascontiguousarray(widen(weights.down_proj)),
        gate_bias=wide_bias(weights.gate_bias),
        up_bias=wide_bias(weights.up_bias),
        down_bias=wide_bias(weights.down_bias),
    )


def _bias_table(
    table: FloatArray | None, slots: Sequence[int], biases: Sequence[FloatArray | None]
) -> FloatArray | None:
    """[n_slots, features] with these rows, or None if no expert has this bias yet.

    A new one: other threads read the old.
    """
    known = [bias for bias in biases if bias is not None]
    if table is None and not known:
        return None
    like = known[0] if table is None else table[0]
    n_slots = max([0 if table is None else len(table), *(slot + 1 for slot in slots)])
    grown = np.zeros((n_slots, len(like)), np.float32)
    if table is not None:
        grown[: len(table)] = table
    for slot, bias in zip(slots, biases, strict=True):
        grown[slot] = 0 if bias is None else bias
    return grown


def _add_bias(values: FloatArray, bias: Array | None) -> None:
    if bias is not None:
        wide = widen(bias)
        np.add(values, wide if values.ndim == 1 else wide[:, np.newaxis], out=values)


def _bytes_as_float32(layer: ExpertLayer | _Layer) -> int:
    """Of all the model's experts of this layer."""
    info = layer.info
    return info.num_experts * 3 * info.hidden_size * info.intermediate_size * 4
