"""The experts of one layer on the CPU: where their weights are, and in which steps they go."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..checkpoint.layer import ExpertLayer, ExpertWeights
from ..dtypes import Array, FloatArray, widen
from ..layers import LayerInfo
from . import Ids, Weights
from .cpu_activation import activate
from .cpu_matmul import multiply

#: Values that are activated at once, in 0.4 to 0.8 ms; and what each takes, as multiply-adds.
_PIECE_ELEMENTS = 1 << 18
_ACTIVATION_WORK = 128


class Layer:
    """The experts of one layer in their stored formats, by slot.

    Read by other threads while one changes it: an entry is complete before its slot is known.
    """

    def __init__(self, info: LayerInfo) -> None:
        self.info = info
        self.multiply_adds = 3 * info.hidden_size * info.intermediate_size
        self.experts: dict[int, Expert] = {}

    def prepare(self, layer: ExpertLayer) -> list[ExpertWeights]:
        """The experts' weights as `add` takes them."""
        return [self._prepare(layer.expert(local_id)) for local_id in range(len(layer))]

    def add(self, weights: list[ExpertWeights]) -> list[int]:
        """Take the experts in; the lowest slots that are free."""
        free = (slot for slot in itertools.count() if slot not in self.experts)
        slots = list(itertools.islice(free, len(weights)))
        self._fill(slots, weights)
        self.experts.update(
            (slot, Expert(self.info, each)) for slot, each in zip(slots, weights, strict=True)
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


class SmallLayer(Layer):
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
        """As `Layer.remove`."""
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


class Expert:
    """One expert applied to activations, [features] or [features, n_rows]."""

    def __init__(self, info: LayerInfo, weights: ExpertWeights) -> None:
        self._info = info
        self._weights = weights
        self.gate_up, self._is_interleaved = _fused(weights.gate_proj, weights.up_proj)

    def steps(self, xs: Sequence[FloatArray]) -> Generator[int, None, list[FloatArray]]:
        """The expert's outputs, [hidden_size] or [hidden_size, n_rows]; steps as `multiply`."""
        activated = []
        for gate, up in (yield from self._project_in(xs)):
            _add_bias(gate, self._weights.gate_bias)
            _add_bias(up, self._weights.up_bias)
            activated.append((yield from self._activate(gate, up)))
        outputs = [np.empty((self._info.hidden_size, *x.shape[1:]), np.float32) for x in xs]
        yield from multiply(self._weights.down_proj, activated, outputs)
        for output in outputs:
            _add_bias(output, self._weights.down_bias)
        return outputs

    def _project_in(
        self, xs: Sequence[FloatArray]
    ) -> Generator[int, None, list[tuple[FloatArray, FloatArray]]]:
        inner = self._info.intermediate_size
        both = [np.empty((2 * inner, *x.shape[1:]), np.float32) for x in xs]
        if len(self.gate_up) == 1:
            yield from multiply(self.gate_up[0], xs, both)
        else:
            yield from multiply(self.gate_up[0], xs, [each[:inner] for each in both])
            yield from multiply(self.gate_up[1], xs, [each[inner:] for each in both])
        if self._is_interleaved:
            return [(each[0::2], each[1::2]) for each in both]
        return [(each[:inner], each[inner:]) for each in both]

    def _activate(self, gate: FloatArray, up: FloatArray) -> Generator[int, None, FloatArray]:
        if gate.size <= _PIECE_ELEMENTS:
            result = activate(self._info, gate, up)
            yield gate.size * _ACTIVATION_WORK
            return result
        result = np.empty(gate.shape, np.float32)
        step = max(1, _PIECE_ELEMENTS // gate[0].size)
        for first in range(0, len(gate), step):
            piece = slice(first, first + step)
            result[piece] = activate(self._info, gate[piece], up[piece])
            yield result[piece].size * _ACTIVATION_WORK
        return result


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


def bytes_as_float32(layer: ExpertLayer | Layer) -> int:
    """Of all the model's experts of this layer."""
    info = layer.info
    return info.num_experts * 3 * info.hidden_size * info.intermediate_size * 4
