"""One model's experts in many places: hot ones in the engine, cold ones on workers, each once.

`forward` sends the cold part first, computes the hot part meanwhile, and adds up. The policy says
how the rows travel; what a lost worker leaves goes to another that holds the experts, or to the
fallback.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from .. import settings
from .._inputs import route
from ..backends import Backend, Ids
from ..choice import MAX_TIMEOUT_S
from ..device_arrays import is_device_array
from ..engine_device import parse_name
from ..errors import InvalidCall
from ..placement import Placement
from ..policy import LocalCost, Policy, Work
from ..routing_stats import RoutingStats
from ..stats import CallTimes
from . import calibration, remote
from .activations import Activations, HostActivations
from .change import PlacementChange, Plans
from .cold import ColdPart, Loss
from .counts import OffloadCounter, OffloadStats
from .explanation import Explanation
from .gpu_activations import EngineGpu
from .layer import LocalExperts, OffloadedLayer
from .plan import Plan
from .remote import Remote, WorkerLike

__all__ = ["ExpertOffload", "Explanation", "LocalExperts", "OffloadStats", "PlacementChange"]

_log = logging.getLogger(__name__)


class ExpertOffload:
    """Routes every (token, expert) pair of a layer to where the placement has the expert.

    `workers`: for each name of the placement the worker's address, a client, or several clients
    of it over different transports. What an address opens is closed by `close`; clients stay the
    caller's. `local`: computes the hot experts, a function or a backend that holds them.
    `policy`: how rows travel, by default as the MOESHM_* variables say. `fallback`: a backend
    that holds every cold expert, for what no worker computes. `engine_device`: as of `connect`, the
    GPU whose arrays `forward` may be given. Several threads may call `forward` if `local` and
    `fallback` allow it.

    PlacementError: a worker is missing, or does not hold what the placement gives it, or there
    are hot experts and no `local`, or `local` or `fallback` lack an expert. SettingError: the
    policy wants a transport that no client of a worker has. As `connect`, for addresses; a slab
    that is refused while other ways are allowed is left out, and shown.
    """

    def __init__(
        self,
        workers: Mapping[str, WorkerLike],
        placement: Placement,
        *,
        local: LocalExperts | Backend | None = None,
        policy: Policy | None = None,
        fallback: Backend | None = None,
        engine_device: str | None = None,
    ) -> None:
        #: How rows travel, as far as it was said.
        self.policy = policy or Policy.from_settings(settings.current())
        engine = parse_name(engine_device, self.policy.transport)
        self._gpu = None if engine is None else EngineGpu(engine)
        self._remotes, self._opened = remote.reach(workers, placement, self.policy, engine)
        try:
            plan = Plan.first(placement, self._remotes, local, fallback)
            calibration.calibrate(self._remotes.values(), self._gpu)
        except BaseException:
            self._close_clients()
            raise
        self._counter = OffloadCounter()
        self._plans = Plans(plan, self._remotes, self._counter.applied)
        #: What the router chose since, by the model's ids.
        self.routing = RoutingStats({n: each.num_experts for n, each in placement.layers.items()})
        self._local_cost = LocalCost()
        self._learning = threading.Lock()

    @property
    def placement(self) -> Placement:
        """Where the experts are now."""
        return self._plans.current.placement

    def forward(
        self,
        layer: int,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        *,
        timeout_s: float | None = None,
        stream: Any = None,
    ) -> Any:
        """The weighted sum of the selected experts' outputs, like hidden_states.

        Arguments as for `ExpertClient.submit`, with the model's (global) ids. Arrays on the
        engine's GPU are those of `stream`, None for their library's current one, and so is the
        result. Such a forward waits for the stream first, to bring ids and weights to the host, and
        for the workers; what the result is added up from is enqueued. WorkerDied, DeadlineExceeded:
        all workers of an expert are lost, and there is no fallback. InvalidCall. SettingError: the
        policy leaves no way for such rows.
        """
        if timeout_s is not None and not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise InvalidCall(f"timeout_s={timeout_s}; it must lie in 0..{MAX_TIMEOUT_S:g}")
        with self._plans.in_use() as plan:
            placed = _find(plan, layer)
            given = self._check(placed, hidden_states, topk_ids, topk_weights, stream)
            with contextlib.closing(given):
                self.routing.observe(layer, given.topk_ids)
                hot_ids, _, n_hot, n_experts = route(given.topk_ids, placed.dispatch.hot)
                local_ns = self._expected_ns(placed, n_hot, n_experts)
                cold = ColdPart(placed, plan.views, self._remotes, given, timeout_s, local_ns, self)
                cold.send(given.topk_ids)
                if n_hot:
                    self._add_hot(placed, given, hot_ids, n_hot, n_experts)
                cold.collect()
                result = given.result()
        self._counter.finished(n_hot, given.on_gpu)
        return result

    def apply(
        self,
        placement: Placement,
        *,
        local: LocalExperts | Backend | None = None,
        fallback: Backend | None = None,
    ) -> PlacementChange:
        """Move experts as another placement says, while forwards go on; returns at once.

        Workers load what they lack; when all of them have it, the next forward goes by the new
        placement, and they drop what it does not give them. Each forward goes by one of the two,
        so results stay exact. `local` and `fallback`, if given, replace those until now at the same
        moment. What a client that was passed in was opened with stays with its worker, too.

        PlacementError: `placement` has other layers, or an unknown worker, or a new hot or cold
        expert that `local` or `fallback` lacks, or another is being applied. What fails later,
        `PlacementChange.result` says.
        """
        return self._plans.change_to(placement, local, fallback)

    def explain(self, layer: int) -> list[Explanation]:
        """For each worker, and each size of work that it was given, what the policy thinks of
        every way to send it. InvalidCall: no such layer."""
        placed = _find(self._plans.current, layer)
        return [
            explanation
            for worker, shape in placed.shapes.items()
            for explanation in self._remotes[worker].explain(shape)
        ]

    def stats(self) -> OffloadStats:
        """Counts and times since it was made."""
        return self._counter.snapshot(self._remotes.values())

    def close(self) -> None:
        """Close the clients that it opened, and release what others hold for it; again does
        nothing. A placement that is being applied will not be."""
        self._plans.close()
        self._close_clients()

    def __enter__(self) -> ExpertOffload:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _close_clients(self) -> None:
        for client in self._opened:
            client.close()

    def _check(
        self,
        placed: OffloadedLayer,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        stream: Any,
    ) -> Activations:
        """The arrays of a forward, wherever they are; InvalidCall."""
        if stream is None and not is_device_array(hidden_states):
            if self.policy.transport == "device":
                raise InvalidCall(
                    "arrays in the host's memory, and transport='device' carries those on a GPU; "
                    "pass them there, or choose another transport"
                )
            return HostActivations(placed.check(hidden_states, topk_ids, topk_weights))
        if self._gpu is None:
            raise InvalidCall(
                "arrays on a GPU; make the offload with engine_device='cuda:0', or pass them in "
                "the host's memory"
            )
        return self._gpu.check(
            placed.number,
            placed.info_for(hidden_states),
            hidden_states,
            topk_ids,
            topk_weights,
            stream,
            self._counter.brought,
        )

    def _add_hot(
        self, placed: OffloadedLayer, given: Activations, ids: Ids, n_slots: int, n_experts: int
    ) -> None:
        start_ns = time.perf_counter_ns()
        placed.add_hot(given, ids)
        elapsed_ns = time.perf_counter_ns() - start_ns
        with self._learning:
            self._local_cost.observe(placed.local_shape, n_slots, n_experts, elapsed_ns)

    def _expected_ns(self, placed: OffloadedLayer, n_slots: int, n_experts: int) -> float:
        """Of the hot part."""
        if not n_slots:
            return 0.0
        with self._learning:
            return self._local_cost.predict(placed.local_shape, n_slots, n_experts)

    # --- as cold.Reports --------------------------------------------------------------------

    def succeeded(self, remote: Remote, work: Work, times: CallTimes) -> None:
        """A worker computed its part."""
        self._counter.succeeded(remote.name, int(work.rows), int(work.slots), times)

    def failed(self, remote: Remote, way: str, error: Loss, pause_s: float) -> None:
        """A worker was lost with slots on their way."""
        if self._counter.lost(remote.name):
            _log.warning(
                "worker %r is left alone for %g s by way of %s: %s",
                remote.name, pause_s, way, str(error),
            )  # fmt: skip

    def fell_back(self, cause: str, n_slots: int) -> None:
        """The fallback computed so many slots."""
        if self._counter.fell_back(cause, n_slots):
            _log.warning("the fallback computes experts in this process: %s", cause)


def _find(plan: Plan, layer: int) -> OffloadedLayer:
    placed = plan.layers.get(layer)
    if placed is None:
        raise InvalidCall(f"layer {layer} is not in the placement, which has {sorted(plan.layers)}")
    return placed
