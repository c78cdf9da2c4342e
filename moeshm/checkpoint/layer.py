"""One description of an MoE layer's experts, whatever layout they were stored in."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

from ..dtypes import Array, dtype_of
from ..errors import CheckpointError
from ..layers import LayerInfo


@dataclass(frozen=True, eq=False, slots=True)
class ExpertWeights:
    """One expert's weights: views of what is stored, of any strides, in the stored dtype.

    `gate_proj` and `up_proj`: [intermediate_size, hidden_size]; `down_proj`: [hidden_size,
    intermediate_size]. An output is `x @ proj.T + bias`.
    """

    gate_proj: Array
    up_proj: Array
    down_proj: Array
    #: [intermediate_size], or None for an expert without biases; so is `up_bias`.
    gate_bias: Array | None = None
    up_bias: Array | None = None
    #: [hidden_size], or None.
    down_bias: Array | None = None

    @property
    def nbytes(self) -> int:
        """Stored bytes of the three projections and the biases."""
        parts = (self.gate_proj, self.up_proj, self.down_proj)
        biases = (self.gate_bias, self.up_bias, self.down_bias)
        return sum(part.nbytes for part in (*parts, *biases) if part is not None)

    def touch(self) -> None:
        """Read a byte of every page, so that mapped weights are in memory."""
        for array in (self.gate_proj, self.up_proj, self.down_proj):
            steps = (max(1, mmap.PAGESIZE // max(1, abs(stride))) for stride in array.strides)
            array[tuple(slice(None, None, step) for step in steps)].copy()


class ExpertLayer:
    """The experts of one MoE layer that are held, in local order.

    `experts[i]` belongs to the model's expert `info.experts[i]`. CheckpointError: a tensor's
    shape or dtype does not fit `info`.
    """

    def __init__(self, info: LayerInfo, experts: Sequence[ExpertWeights]) -> None:
        if len(experts) != len(info.experts):
            raise CheckpointError(
                f"{len(experts)} experts for {len(info.experts)} ids; pass one for each"
            )
        for expert_id, weights in zip(info.experts, experts, strict=True):
            _check(info, expert_id, weights)
        self.info = info
        self._experts = tuple(experts)

    def expert(self, local_id: int) -> ExpertWeights:
        """The weights of the expert `info.experts[local_id]`."""
        return self._experts[local_id]

    @property
    def nbytes(self) -> int:
        """Stored bytes of its experts."""
        return sum(each.nbytes for each in self._experts)

    def __len__(self) -> int:
        return len(self._experts)


def _check(info: LayerInfo, expert_id: int, weights: ExpertWeights) -> None:
    hidden, inner = info.hidden_size, info.intermediate_size
    for name, shape in (
        ("gate_proj", (inner, hidden)),
        ("up_proj", (inner, hidden)),
        ("down_proj", (hidden, inner)),
        ("gate_bias", (inner,)),
        ("up_bias", (inner,)),
        ("down_bias", (hidden,)),
    ):
        array: Array | None = getattr(weights, name)
        if array is None:
            continue
        if array.shape != shape:
            raise CheckpointError(
                f"{name} of expert {expert_id} has shape {list(array.shape)}; "
                f"hidden_size {hidden} and intermediate_size {inner} need {list(shape)}"
            )
        dtype = dtype_of(array)
        if array.ndim == 2 and dtype is not info.weight_dtype:
            raise CheckpointError(
                f"{name} of expert {expert_id} is {dtype}, but the layer is "
                f"{info.weight_dtype}; save the layer in one dtype"
            )
