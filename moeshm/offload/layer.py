"""One layer of an offload: its tables, and what computes its experts in the engine's process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Inputs
from ..backends import Backend, Ids, Weights
from ..client import ExpertClient
from ..dtypes import Array, FloatArray
from ..layers import LayerInfo
from ..placement import Placement, PlacementError
from . import dispatch
from .dispatch import LayerDispatch, Table

#: `(layer, hidden_states [n, hidden_size], topk_ids [n, top_k], topk_weights [n, top_k])` to
#: [n, hidden_size]: computes hot experts. Ids are the model's, -1 for all that is not hot.
LocalExperts = Callable[[int, Array, Ids, Weights], Array]


class OffloadedLayer:
    """One layer: its tables, and what computes its experts in this process."""

    def __init__(
        self,
        number: int,
        placement: Placement,
        workers: Mapping[str, ExpertClient],
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
        self._info = self._find_info(placement, workers)

    def check(self, hidden_states: Any, topk_ids: Any, topk_weights: Any) -> Inputs:
        """The inputs with global ids; InvalidCall."""
        info = self._info
        if info is None:
            shape = np.shape(hidden_states)
            hidden_size = int(shape[-1]) if shape else 1
            info = _whole(self.dispatch.num_experts, hidden_size, self.dispatch.num_experts)
        return arrays.check(self.number, info, hidden_states, topk_ids, topk_weights, False)

    def compute_hot(self, inputs: Inputs, ids: Ids) -> Array:
        """The hot experts' part, of any dtype."""
        if self._local is not None:
            return np.asarray(
                self._local(self.number, inputs.hidden_states, ids, inputs.topk_weights)
            )
        assert self._local_backend is not None
        return self._run(self._local_backend, self._local_table, inputs, ids)

    def compute_fallback(self, inputs: Inputs, ids: Ids) -> Array:
        """The part of these global ids, computed by the fallback."""
        assert self.fallback is not None
        return self._run(self.fallback, self._fallback_table, inputs, ids)

    def _run(self, backend: Backend, table: Table, inputs: Inputs, ids: Ids) -> FloatArray:
        result = np.empty(inputs.hidden_states.shape, np.float32)
        backend.ffn(self.number, inputs.hidden_states, table[ids], inputs.topk_weights, result)
        return result

    def _find_info(
        self, placement: Placement, workers: Mapping[str, ExpertClient]
    ) -> LayerInfo | None:
        """The sizes of the layer, from whoever knows it."""
        known = [workers[name].layers for name in placement.workers if name in workers]
        known += [each.layers for each in (self._local_backend, self.fallback) if each is not None]
        for layers in known:
            info = layers.get(self.number)
            if info is not None:
                return _whole(info.num_experts, info.hidden_size, info.top_k)
        return None


def _whole(num_experts: int, hidden_size: int, top_k: int) -> LayerInfo:
    return LayerInfo(
        hidden_size=hidden_size,
        intermediate_size=1,
        num_experts=num_experts,
        top_k=top_k,
        experts=tuple(range(num_experts)),
    )
