"""A backend in the engine's own process that computes what a lost worker leaves."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .arrays import Inputs
from .backends import Backend
from .dtypes import Array
from .errors import DeadlineExceeded, InvalidCall, SettingError, WorkerDied
from .layers import LayerInfo
from .protocol import SlotTable
from .stats import StatsCounter

if TYPE_CHECKING:
    from .held import HeldView

_log = logging.getLogger(__name__)

#: It may hold more experts, in another order, and their weights in another format.
_ALIKE = sorted({*LayerInfo.__struct_fields__} - {"experts", "weight_dtype"})


class Fallback:
    """Computes a client's calls; counts them, and logs each cause once.

    SettingError: the backend does not hold all that the worker does.
    """

    def __init__(
        self, backend: Backend, layers: Mapping[int, LayerInfo], counter: StatsCounter
    ) -> None:
        self._backend = backend
        self._counter = counter
        # By view and layer, what `_table` gives.
        self._tables: weakref.WeakKeyDictionary[HeldView, dict[int, SlotTable | None]] = (
            weakref.WeakKeyDictionary()
        )
        why = self._misfit(layers)
        if why:
            raise SettingError(f"the fallback {why}; load it from the same checkpoint")

    def check_experts(self, experts: Mapping[int, tuple[int, ...]]) -> None:
        """InvalidCall names an expert that it does not hold."""
        for layer, ids in experts.items():
            why = self._missing(layer, ids)
            if why:
                raise InvalidCall(
                    f"the fallback {why}; open a client whose fallback holds all that may be asked "
                    "for"
                )

    def check(self, layers: Mapping[int, LayerInfo]) -> None:
        """InvalidCall names a layer that is another than the worker's."""
        why = self._misfit(layers)
        if why:
            raise InvalidCall(
                f"the fallback {why}; open a client whose fallback is of the same checkpoint"
            )

    def _misfit(self, layers: Mapping[int, LayerInfo]) -> str:
        """Why it cannot stand in for them; empty when it can."""
        for number, info in layers.items():
            why = self._missing(number, info.experts)
            if why:
                return why
            held = self._backend.layers.get(number, info)
            for name in _ALIKE:
                here, there = getattr(held, name), getattr(info, name)
                if here != there:
                    return f"has layer {number} with {name}={here}, and the worker with {there}"
        return ""

    def _missing(self, layer: int, experts: tuple[int, ...]) -> str:
        held = self._backend.layers.get(layer)
        missing = set(experts).difference(() if held is None else held.experts)
        return f"does not hold expert {min(missing)} of layer {layer}" if missing else ""

    def compute(
        self,
        view: HeldView,
        layer: int,
        inputs: Inputs,
        array: Array,
        error: WorkerDied | DeadlineExceeded,
    ) -> None:
        """Compute what the worker did not, because of this error, into the array."""
        cause = "deadline" if isinstance(error, DeadlineExceeded) else "worker_died"
        if self._counter.fell_back(cause):
            _log.warning("the fallback computes calls of this process: %s", error)
        table = self._table_of(view, layer)
        ids = inputs.topk_ids if table is None else table[inputs.topk_ids]
        self._backend.ffn(layer, inputs.hidden_states, ids, inputs.topk_weights, array)

    def _table_of(self, view: HeldView, layer: int) -> SlotTable | None:
        """Local ids of the view to the backend's; None where they are the same."""
        tables = self._tables.setdefault(view, {})
        if layer not in tables:
            experts, held = view.layers[layer].experts, self._backend.layers[layer].experts
            tables[layer] = None if experts == held[: len(experts)] else _table(experts, held)
        return tables[layer]


def _table(experts: tuple[int, ...], held: tuple[int, ...]) -> SlotTable:
    """Local ids of the one order to those of the other, and -1 to itself."""
    places = {expert: place for place, expert in enumerate(held)}
    return np.array([*(places[expert] for expert in experts), -1], np.int32)
