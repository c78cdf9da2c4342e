"""One model's experts in many places: hot ones in the engine, cold ones on workers, each once.

`forward` sends the cold part first, computes the hot part meanwhile, and adds up. What a lost
worker leaves goes to another that holds the experts, or to the fallback.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from .. import arrays
from ..backends import Backend
from ..client import ExpertClient
from ..dtypes import Array, FloatArray, dtype_of, narrow, widen
from ..errors import InvalidCall
from ..placement import Placement
from ..routing_stats import RoutingStats
from . import dispatch
from .cold import ColdPart, Loss
from .layer import LocalExperts, OffloadedLayer

__all__ = ["ExpertOffload", "LocalExperts", "OffloadStats"]

_log = logging.getLogger(__name__)

#: A lost worker is left alone for so long, then twice as long after each further failure.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


class OffloadStats(msgspec.Struct, frozen=True, kw_only=True):
    """Since the offload was made. A slot is one (token, expert) pair."""

    forwards: int
    hot_slots: int
    #: By worker, the slots that it computed.
    cold_slots: dict[str, int]
    #: By worker, how often it was lost with slots on their way.
    losses: dict[str, int]
    #: Slots that the fallback computed, by the cause: "worker_died", "deadline", "worker_down".
    fallback_slots: dict[str, int]


class ExpertOffload:
    """Routes every (token, expert) pair of a layer to where the placement has the expert.

    `workers`: a client for each name of the placement; they stay the caller's to close. `local`:
    computes the hot experts, a function or a backend that holds them. `fallback`: a backend that
    holds every cold expert, for what no worker computes. Several threads may call `forward` if
    `local` and `fallback` allow it.

    PlacementError: a client is missing, or does not hold what the placement gives its worker, or
    there are hot experts and no `local`, or `local` or `fallback` lack an expert.
    """

    def __init__(
        self,
        workers: Mapping[str, ExpertClient],
        placement: Placement,
        *,
        local: LocalExperts | Backend | None = None,
        fallback: Backend | None = None,
    ) -> None:
        dispatch.check_clients(placement, workers)
        self.placement = placement
        #: What the router chose since, by the model's ids.
        self.routing = RoutingStats({n: each.num_experts for n, each in placement.layers.items()})
        self._workers = dict(workers)
        self._layers = {
            number: OffloadedLayer(number, placement, workers, local, fallback)
            for number in placement.layers
        }
        self._health = {name: _Health() for name in placement.workers}
        self._lock = threading.Lock()
        self._forwards = self._hot_slots = 0
        self._cold_slots: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self._fallback_slots: Counter[str] = Counter()

    def forward(
        self,
        layer: int,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        *,
        timeout_s: float | None = None,
    ) -> Any:
        """The weighted sum of the selected experts' outputs, like hidden_states.

        Arguments as for `ExpertClient.submit`, with the model's (global) ids. WorkerDied,
        DeadlineExceeded: all workers of an expert are lost, and there is no fallback. InvalidCall.
        """
        placed = self._layers.get(layer)
        if placed is None:
            raise InvalidCall(
                f"layer {layer} is not in the placement, which has {sorted(self._layers)}"
            )
        inputs = placed.check(hidden_states, topk_ids, topk_weights)
        self.routing.observe(layer, inputs.topk_ids)
        output, array = arrays.make_output(inputs, None)
        total = _Sum()

        down = {name for name, health in self._health.items() if health.is_down()}
        cold = ColdPart(placed, self._workers, inputs, timeout_s, frozenset(down), self)
        cold.send(inputs.topk_ids)
        hot_ids = placed.dispatch.hot[inputs.topk_ids]
        n_hot = int(np.count_nonzero(hot_ids >= 0))
        if n_hot:
            total.add(placed.compute_hot(inputs, hot_ids))
        cold.collect(total)
        total.store(array)
        with self._lock:
            self._forwards += 1
            self._hot_slots += n_hot
        return output

    def stats(self) -> OffloadStats:
        """Counts since it was made."""
        with self._lock:
            return OffloadStats(
                forwards=self._forwards,
                hot_slots=self._hot_slots,
                cold_slots=dict(self._cold_slots),
                losses=dict(self._losses),
                fallback_slots=dict(self._fallback_slots),
            )

    # --- as cold.Reports --------------------------------------------------------------------

    def succeeded(self, worker: str, n_slots: int) -> None:
        """A worker computed so many slots."""
        self._health[worker].recover()
        with self._lock:
            self._cold_slots[worker] += n_slots

    def failed(self, worker: str, error: Loss) -> None:
        """A worker was lost with slots on their way."""
        pause_s = self._health[worker].fail()
        with self._lock:
            self._losses[worker] += 1
            is_first = self._losses[worker] == 1
        if is_first:
            _log.warning("worker %r is left alone for %g s: %s", worker, pause_s, error)

    def fell_back(self, cause: str, n_slots: int) -> None:
        """The fallback computed so many slots."""
        with self._lock:
            is_first = cause not in self._fallback_slots
            self._fallback_slots[cause] += n_slots
        if is_first:
            _log.warning("the fallback computes experts in this process: %s", cause)


class _Health:
    """Whether a worker is worth asking."""

    def __init__(self) -> None:
        self._pause_s = 0.0
        self._until = 0.0

    def is_down(self) -> bool:
        return time.monotonic() < self._until

    def recover(self) -> None:
        self._pause_s = self._until = 0.0

    def fail(self) -> float:
        if self.is_down():  # another thread counted this outage
            return self._pause_s
        self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s or FIRST_PAUSE_S)
        self._until = time.monotonic() + self._pause_s
        return self._pause_s


class _Sum:
    """Adds parts in float32, in the order in which they come."""

    def __init__(self) -> None:
        self._total: FloatArray | None = None

    def add(self, part: Array) -> None:
        """Add a part of any dtype."""
        if self._total is None:
            self._total = widen(part)
            self._is_own = self._total is not part
        elif self._is_own:
            np.add(self._total, widen(part), out=self._total)
        else:
            self._total = self._total + widen(part)
            self._is_own = True

    def store(self, array: Array) -> None:
        """Write the sum; zeros if there was no part."""
        if self._total is None:
            array[...] = 0
        else:
            narrow(self._total, dtype_of(array), out=array)
