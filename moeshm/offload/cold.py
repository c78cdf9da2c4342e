"""The cold part of one forward: what is on its way to workers, and what lost ones leave."""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np

from ..arrays import Inputs
from ..backends import Ids
from ..call import CallFuture
from ..client import ExpertClient
from ..dtypes import Array
from ..errors import DeadlineExceeded, WorkerDied
from .layer import OffloadedLayer

Loss = WorkerDied | DeadlineExceeded


class Reports(Protocol):
    """Who keeps the counts."""

    def succeeded(self, worker: str, n_slots: int) -> None: ...
    def failed(self, worker: str, error: Loss) -> None: ...
    def fell_back(self, cause: str, n_slots: int) -> None: ...


class Sum(Protocol):
    """What the parts are added to."""

    def add(self, part: Array) -> None: ...


class ColdPart:
    """Sends slots to workers, and what is lost to others, until every slot was computed once.

    A slot is sent again only after the call that carried it ended with an error, and the result of
    such a call is never added: so each counts once. `down`: workers that are not asked if anybody
    else can compute their slots.
    """

    def __init__(
        self,
        layer: OffloadedLayer,
        clients: dict[str, ExpertClient],
        inputs: Inputs,
        timeout_s: float | None,
        down: frozenset[str],
        reports: Reports,
    ) -> None:
        self._layer = layer
        self._clients = clients
        self._inputs = inputs
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._down = down
        self._reports = reports
        self._losses: dict[str, Loss] = {}
        self._sent: list[tuple[str, Ids, CallFuture | Loss]] = []
        self._orphans: Ids | None = None

    def send(self, ids: Ids) -> None:
        """Send these global ids to the workers that have them; hot ones stay here."""
        # Whoever is asked when no time is left could not answer, and would be blamed for it.
        is_late = self._losses and self._left_s() == 0
        left_out = frozenset(self._clients) if is_late else self._down | frozenset(self._losses)
        routes = self._layer.dispatch.routes(left_out)
        orphans = routes.orphans[ids]
        if (orphans >= 0).any():
            if self._layer.fallback is None and self._down and not is_late:
                # Better a worker that may be gone than none.
                self._down = frozenset()
                self.send(ids)
                return
            self._orphans = orphans
        for worker, table in routes.by_worker.items():
            local_ids = table[ids]
            is_sent = local_ids >= 0
            if is_sent.any():
                carried = np.where(is_sent, ids, np.int32(-1))
                self._sent.append((worker, carried, self._submit(worker, local_ids)))

    def collect(self, total: Sum) -> None:
        """Add every result; WorkerDied, DeadlineExceeded: some slots nobody can compute."""
        while self._sent or self._orphans is not None:
            self._fall_back(total)
            left = np.full_like(self._inputs.topk_ids, -1)
            sent, self._sent = self._sent, []
            for worker, ids, future in sent:
                try:
                    if isinstance(future, Loss):
                        raise future
                    part = future.result()
                except (WorkerDied, DeadlineExceeded) as error:
                    self._losses[worker] = error
                    self._reports.failed(worker, error)
                    np.maximum(left, ids, out=left)
                else:
                    total.add(part)
                    self._reports.succeeded(worker, int(np.count_nonzero(ids >= 0)))
            if (left >= 0).any():
                self.send(left)

    def _submit(self, worker: str, local_ids: Ids) -> CallFuture | Loss:
        inputs = self._inputs
        left_s = self._left_s()
        try:
            return self._clients[worker].submit(
                self._layer.number,
                inputs.hidden_states,
                local_ids,
                inputs.topk_weights,
                timeout_s=None if left_s is None else max(1e-3, left_s),
            )
        except (WorkerDied, DeadlineExceeded) as error:
            return error

    def _left_s(self) -> float | None:
        """Seconds to the deadline of the forward, 0 once it is past; None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _fall_back(self, total: Sum) -> None:
        """Compute here what no worker takes."""
        ids, self._orphans = self._orphans, None
        if ids is None:
            return
        loss = next(reversed(self._losses.values()), None)
        if self._layer.fallback is None:
            assert loss is not None
            raise loss
        total.add(self._layer.compute_fallback(self._inputs, ids))
        cause = "worker_down"
        if loss is not None:
            cause = "deadline" if isinstance(loss, DeadlineExceeded) else "worker_died"
        self._reports.fell_back(cause, int(np.count_nonzero(ids >= 0)))
