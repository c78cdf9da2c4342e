"""One layer of an offload: its tables, and what computes its experts in the engine's process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Inputs
from ..backends import Backend, Ids, Weights
from ..dtypes import Array, FloatArray, widen
from ..errors import InvalidCall
from ..layers import LayerInfo
from ..placement import Placement, PlacementError
from ..policy import Shape
from . import dispatch
from .activations import Activations
from .dispatch import LayerDispatch

#: `(layer, hidden_states [n, hidden_size], topk_ids [n, top_k], topk_weights [n, top_k])` to
#: [n, hidden_size]: computes hot experts. Arrays are in the host's memory. Ids are the model's, -1
#: for all that is not hot.
LocalExperts = Callable[[int, Array, Ids, Weights], Array]


class OffloadedLayer:
    """One layer: its tables, and what computes its experts in this process.

    `held`: by worker, what it holds. PlacementError: there are hot experts and no `local`, or
    `local` or `fallback` lack an expert.
    """

    def __init__(
        self,
        number: int,
        placement: Placement,
        held: Mapping[str, Mapping[int, LayerInfo]],
        local: LocalExperts | Backend | None,
        fallback: Backend | None,
    ) -> None:
        self.number = number
        self.dispatch = LayerDispatch(number, placement)
        self._local: LocalExperts | None = None
        self._local_backend: Backend | None = None
        hot = placement.layers[number].hot
        if hot:
            if local is None:
                raise PlacementError(
                    f"layer {number} has hot experts; pass `local`, which computes them"
                )
            if callable(local):
                self._local = local
            else:
                self._local_backend = local
                self._local_table = dispatch.check_backend("local backend", local, number, hot)
        self.fallback = fallback
        cold = sorted(set(range(self.dispatch.num_experts)).difference(hot))
        if fallback is not None and cold:
            self._fallback_table = dispatch.check_backend("fallback", fallback, number, cold)
        #: By worker, what the layer costs there depends on.
        self.shapes = {
            worker: shape_of(layers[number]) for worker, layers in held.items() if number in layers
        }
        self._info = self._find_info(held)
        #: As `shapes`, of the hot part.
        self.local_shape = Shape(
            self._info.hidden_size if self._info else 0,
            self._info.intermediate_size if self._info else 0,
        )

    def check(self, hidden_states: Any, topk_ids: Any, topk_weights: Any) -> Inputs:
        """The inputs with global ids; InvalidCall."""
        info = self.info_for(hidden_states)
        return arrays.check(self.number, info, hidden_states, topk_ids, topk_weights, False)

    def info_for(self, hidden_states: Any) -> LayerInfo:
        """What a forward may hold; by hidden_states where nobody knows the layer."""
        if self._info is not None:
            return self._info
        shape = hidden_states.shape if hasattr(hidden_states, "shape") else np.shape(hidden_states)
        hidden_size = int(shape[-1]) if shape else 1
        return _whole(self.dispatch.num_experts, hidden_size, 1, self.dispatch.num_experts)

    def add_hot(self, given: Activations, ids: Ids) -> None:
        """Compute the hot experts' part, and add it; InvalidCall: `local` gave another shape."""
        if self._local_backend is not None:
            given.run(self._local_backend, self.number, self._local_table[ids])
        else:
            given.add(self._call_local(given.inputs(), ids))

    def add_fallback(self, given: Activations, ids: Ids) -> None:
        """Let the fallback compute the part of these global ids, and add it."""
        assert self.fallback is not None
        given.run(self.fallback, self.number, self._fallback_table[ids])

    def _call_local(self, inputs: Inputs, ids: Ids) -> FloatArray:
        """In an array that is the caller's."""
        assert self._local is not None
        result = np.asarray(
            self._local(self.number, inputs.hidden_states, ids, inputs.topk_weights)
        )
        if result.shape != inputs.hidden_states.shape:
            raise InvalidCall(
                f"`local` gave {list(result.shape)} for layer {self.number}; it must return "
                f"{list(inputs.hidden_states.shape)}, like hidden_states"
            )
        total = widen(result)
        # What it returned may be its own buffer, or the engine's.
        return total.copy() if total is result else total

    def _find_info(self, held: Mapping[str, Mapping[int, LayerInfo]]) -> LayerInfo | None:
        """The sizes of the layer, from whoever knows it."""
        known = list(held.values())
        known += [each.layers for each in (self._local_backend, self.fallback) if each is not None]
        for layers in known:
            info = layers.get(self.number)
            if info is not None:
                return _whole(
                    info.num_experts, info.hidden_size, info.intermediate_size, info.top_k
                )
        return None


def shape_of(info: LayerInfo) -> Shape:
    """What the cost of a layer depends on."""
    return Shape(info.hidden_size, info.intermediate_size)


def _whole(num_experts: int, hidden_size: int, intermediate_size: int, top_k: int) -> LayerInfo:
    return LayerInfo(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=num_experts,
        top_k=top_k,
        experts=tuple(range(num_experts)),
    )
