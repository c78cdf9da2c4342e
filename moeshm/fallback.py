"""A backend in the engine's own process that computes what a lost worker leaves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec
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


class Fallback:
    """Computes a client's calls; counts them, and logs each cause once.

    SettingError: the backend does not hold what the worker does, in the same local order.
    """

    def __init__(
        self, backend: Backend, layers: Mapping[int, LayerInfo], counter: StatsCounter
    ) -> None:
        self._backend = backend
        self._counter = counter
        for number, info in layers.items():
            held = backend.layers.get(number)
            # Only the stored format of the weights may differ.
            if (
                held is None
                or msgspec.structs.replace(held, weight_dtype=info.weight_dtype) != info
            ):
                raise SettingError(
                    f"the fallback does not hold the same experts of layer {number} as the worker; "
                    "load it from the same checkpoint with the same experts"
                )

    def check(self, experts: Mapping[int, tuple[int, ...]]) -> None:
        """InvalidCall names an expert that it does not hold."""
        for layer, ids in experts.items():
            held = self._backend.layers.get(layer)
            missing = set(ids).difference(() if held is None else held.experts)
            if missing:
                raise InvalidCall(
                    f"the fallback does not hold expert {min(missing)} of layer {layer}; open a "
                    "client whose fallback holds all that may be asked for"
                )

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
        ids = inputs.topk_ids
        experts, held = view.layers[layer].experts, self._backend.layers[layer].experts
        if experts != held:
            ids = _table(experts, held)[ids]
        self._backend.ffn(layer, inputs.hidden_states, ids, inputs.topk_weights, array)


def _table(experts: tuple[int, ...], held: tuple[int, ...]) -> SlotTable:
    """Local ids of the one order to those of the other, and -1 to itself."""
    places = {expert: place for place, expert in enumerate(held)}
    return np.array([*(places[expert] for expert in experts), -1], np.int32)
