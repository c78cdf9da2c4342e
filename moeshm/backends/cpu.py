"""Experts on the CPU: rows grouped by expert, weights in their stored format, float32 sums."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.layer import ExpertLayer
from ..dtypes import Array, DType, FloatArray, dtype_of, narrow, widen
from ..layers import LayerInfo
from . import BetweenSteps, Ids, Weights
from .cpu_blas import ONE_THREAD
from .cpu_layer import Layer, SmallLayer, bytes_as_float32
from .cpu_matmul import MOST_ROWS
from .cpu_team import Pace, Task, Team

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
#: Values that are copied or summed at once, in 0.3 to 1.5 ms; and what each takes, as
#: multiply-adds.
_PIECE_ELEMENTS = 1 << 20
_COPY_WORK = 64

Slots = npt.NDArray[np.intp]


class CpuBackend:
    """Computes experts with NumPy and its BLAS, on the calling thread and `threads - 1` others;
    by default on as many as there are usable CPUs.

    Weights stay where they are, memory-mapped, in the stored dtype; a block at a time is
    widened to float32 in the cache (`cpu_matmul`). Only layers that are small together, with all
    the model's experts, held or not, are widened once, here. `ffn` may be called by several
    threads at a time, also while another adds or removes experts: it is a `GrowingBackend`, and a
    `SteppingBackend`.

    Threads take whole experts. While experts multiply by several rows, NumPy's BLAS has one thread
    for the whole process (`cpu_blas`): its own would fight these, and may be wrong beside them.
    Every run of a call gives the same bits, whatever `threads` is and however often it pauses. In
    another batch a token's result may differ in its last bits, because BLAS sums in another order
    for another number of rows; the weighted sum over its experts always goes slot by slot.
    ValueError: `threads` below 1.
    """

    name = "cpu"

    def __init__(self, layers: Mapping[int, ExpertLayer], threads: int | None = None) -> None:
        if threads is None:
            threads = len(os.sched_getaffinity(0))
        if threads < 1:
            raise ValueError(f"threads={threads}; it must be at least 1")
        self._layers: dict[int, Layer] = {}
        is_small = sum(map(bytes_as_float32, layers.values())) <= SMALL_MODEL_BYTES
        for number, layer in layers.items():
            self._layers[number] = (SmallLayer if is_small else Layer)(layer.info)
            self._layers[number].add(self._layers[number].prepare(layer))
        self.layers: Mapping[int, LayerInfo] = {n: layer.info for n, layer in layers.items()}
        self._changing = threading.Lock()
        self._team = Team(threads)

    def ffn(
        self,
        layer: int,
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
    ) -> None:
        """As `Backend.ffn`."""
        self.ffn_in_steps(layer, hidden_states, topk_ids, topk_weights, out, None)

    def ffn_in_steps(
        self,
        layer: int,
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
        between_steps: BetweenSteps | None,
    ) -> None:
        """As `SteppingBackend.ffn_in_steps`; None for no pauses."""
        held = self._layers[layer]
        # Infinities and NaN of the input belong into the output, not into a warning.
        with np.errstate(all="ignore"):
            if isinstance(held, SmallLayer) and len(hidden_states) <= FEW_TOKENS:
                x = widen(hidden_states)
                result = np.empty(x.shape, np.float32)
                for row in zip(x, topk_ids, topk_weights, result, strict=True):
                    held.one_token(*row)
                narrow(result, dtype_of(out), out=out)
                return
            # Not above: products with one row are none of those that mix, and the shortest calls
            # took 3 us longer.
            with ONE_THREAD:
                self._compute(held, hidden_states, topk_ids, topk_weights, out, Pace(between_steps))

    def _compute(
        self,
        held: Layer,
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
        pace: Pace,
    ) -> None:
        """In parts of which the experts' outputs are held at once."""
        step = max(1, MAX_ROWS // topk_ids.shape[1])
        for token in range(0, len(hidden_states), step):
            part = slice(token, token + step)
            x = _widened(hidden_states[part], pace)
            outputs, used = self._outputs(held, x, topk_ids[part], topk_weights[part], pace)
            _write_sums(outputs, used, dtype_of(out), out[part], pace)

    def add(self, layer: int, experts: ExpertLayer) -> list[int]:
        """As `GrowingBackend.add`."""
        with self._changing:
            held = self._layers.get(layer)
            if held is None:
                # However many layers come, no more is widened than a small model has.
                n_bytes = sum(
                    bytes_as_float32(each)
                    for each in self._layers.values()
                    if isinstance(each, SmallLayer)
                ) + bytes_as_float32(experts)
                held = (SmallLayer if n_bytes <= SMALL_MODEL_BYTES else Layer)(experts.info)
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

    def _outputs(
        self, held: Layer, x: FloatArray, ids: Ids, weights: Weights, pace: Pace
    ) -> tuple[FloatArray, Weights]:
        """The experts' outputs, float32 [n_tokens, top_k, hidden_size], and their weights."""
        n_tokens, top_k = ids.shape
        outputs = np.empty((n_tokens * top_k, x.shape[1]), np.float32)
        empty, groups = _by_expert(ids)
        for piece in _pieces(len(empty), x.shape[1]):
            outputs[empty[piece]] = 0
            pace.did(len(empty[piece]) * x.shape[1] * _COPY_WORK)
        # Longest first, so that threads finish together.
        groups.sort(key=lambda group: -len(group[1]))
        tasks = [_compute_group(held, x, top_k, *group, outputs) for group in groups]
        multiply_adds = (len(outputs) - len(empty)) * held.multiply_adds
        self._team.run(tasks, multiply_adds >= PARALLEL_MIN * len(groups), pace)
        if len(empty):
            weights = np.where(ids < 0, np.float32(0), weights)
        return outputs.reshape(n_tokens, top_k, -1), weights


def _compute_group(
    held: Layer, x: FloatArray, top_k: int, local_id: int, slots: Slots, outputs: FloatArray
) -> Task:
    """Fill these rows of the outputs by one expert."""
    expert = held.experts[local_id]
    if len(x) == 1:
        (outputs[slots],) = yield from expert.steps([x[0]])
        return
    # Evenly, as few rows are slow.
    parts = np.array_split(slots, -(-len(slots) // MOST_ROWS))
    xs: list[FloatArray] = []
    for part in parts:
        xs.append(x[part // top_k].T)
        yield xs[-1].size * _COPY_WORK
    for part, found in zip(parts, (yield from expert.steps(xs)), strict=True):
        outputs[part] = found.T
        yield found.size * _COPY_WORK


def _widened(stored: Array, pace: Pace) -> FloatArray:
    """As float32; as it is, if it is that."""
    if stored.size <= _PIECE_ELEMENTS or stored.dtype == np.float32:
        return widen(stored)
    x = np.empty(stored.shape, np.float32)
    for piece in _pieces(*stored.shape):
        widen(stored[piece], x[piece])
        pace.did(x[piece].size * _COPY_WORK)
    return x


def _write_sums(
    outputs: FloatArray, weights: Weights, dtype: DType, out: Array, pace: Pace
) -> None:
    """Into `out`, for each token the weighted sum of its experts' outputs."""
    _, top_k, hidden_size = outputs.shape
    for piece in _pieces(len(outputs), top_k * hidden_size):
        # One product per token, so that no token's sum depends on how many others there are.
        summed: FloatArray = np.matmul(weights[piece, np.newaxis], outputs[piece])
        narrow(summed[:, 0], dtype, out=out[piece])
        pace.did(outputs[piece].size * _COPY_WORK)


def _pieces(n_rows: int, row_elements: int) -> Iterator[slice]:
    """Of what is read and written once."""
    step = max(1, _PIECE_ELEMENTS // row_elements)
    return (slice(first, first + step) for first in range(0, n_rows, step))


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
