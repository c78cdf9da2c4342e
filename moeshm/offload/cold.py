"""The cold part of one forward: what is on its way to workers, and what lost ones leave."""

from __future__ import annotations

import time
from collections.abc import Mapping, Set
from typing import NamedTuple, Protocol

import numpy as np

from .._inputs import route
from ..backends import Ids
from ..errors import DeadlineExceeded, WorkerDied
from ..policy import Choice, Work
from ..stats import CallTimes
from .activations import Activations, Pending
from .dispatch import Table
from .layer import OffloadedLayer
from .plan import Views
from .remote import Remote, times_of

Loss = WorkerDied | DeadlineExceeded


class Reports(Protocol):
    """Who keeps the counts."""

    def succeeded(self, remote: Remote, work: Work, times: CallTimes) -> None: ...
    def failed(self, remote: Remote, way: str, error: Loss, pause_s: float) -> None: ...
    def fell_back(self, cause: str, n_slots: int) -> None: ...


class _Sent(NamedTuple):
    remote: Remote
    #: The global ids of which the table's are with this worker.
    ids: Ids
    table: Table
    work: Work
    choice: Choice
    start_ns: int
    outcome: Pending | Loss
    #: False when no time was left to ask.
    is_asked: bool

    def carried(self) -> Ids:
        """The global ids that this worker was asked for."""
        return np.where(self.table[self.ids] >= 0, self.ids, np.int32(-1))


class ColdPart:
    """Sends slots to workers, and what is lost to others, until every slot was computed once.

    A slot is sent again only after the call that carried it ended with an error, and the result of
    such a call is never added: so each counts once. Ways that were lost a moment ago are not
    taken, and workers that no other way leads to not asked, if anybody else can compute their
    slots. What a worker loses goes to others, then to it by another way, and then to the fallback.
    `local_ns`: what the engine is expected to do meanwhile.
    """

    def __init__(
        self,
        layer: OffloadedLayer,
        views: Views,
        remotes: Mapping[str, Remote],
        given: Activations,
        timeout_s: float | None,
        local_ns: float,
        reports: Reports,
    ) -> None:
        self._layer = layer
        self._views = views
        self._remotes = remotes
        self._given = given
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._local_ns = local_ns
        #: By worker, the ways that were left alone before, and those that were lost since.
        self._paused = {n: remote.down_ways() for n, remote in remotes.items()}
        self._tried: dict[str, Set[str]] = {}
        #: Workers that are not asked at present.
        self._left_out = frozenset(n for n in remotes if not self._has_way(n))
        self._reports = reports
        self._losses: dict[str, Loss] = {}
        self._sent: list[_Sent] = []
        self._lost: list[_Sent] = []
        self._orphans: Ids | None = None

    def send(self, ids: Ids) -> None:
        """Send these global ids to the workers that have them; hot ones stay here."""
        # Whoever is asked when no time is left could not answer, and would be blamed for it.
        is_late = self._losses and self._left_s() == 0
        left_out = frozenset(self._remotes) if is_late else self._left_out
        routes = self._layer.dispatch.routes(left_out)
        if routes.has_orphans:
            orphans, _, n_orphans, _ = route(ids, routes.orphans)
            if n_orphans:
                if not is_late and self._readmits():
                    self.send(ids)
                    return
                self._orphans = orphans
        for worker, table in routes.by_worker.items():
            self._send_to(self._remotes[worker], ids, table)

    def collect(self) -> None:
        """Add every result; WorkerDied, DeadlineExceeded: some slots nobody can compute."""
        try:
            while self._sent or self._orphans is not None:
                self._fall_back()
                sent, self._sent = self._sent, []
                lost = [each for each in sent if not self._took(each)]
                if lost:
                    self._lost += [each for each in lost if each.is_asked]
                    left = np.full_like(self._given.topk_ids, -1)
                    for each in lost:
                        np.maximum(left, each.carried(), out=left)
                    self.send(left)
        finally:
            now_ns = time.perf_counter_ns()
            for each in self._lost:
                # All that it took until the slots were computed elsewhere, or nobody could.
                shape = self._layer.shapes[each.remote.name]
                each.remote.chooser.lost(shape, each.work, each.choice, now_ns - each.start_ns)

    def _readmits(self) -> bool:
        """Ask workers again that another way leads to; False if none does."""
        if self._layer.fallback is None and not any(map(self._has_way, self._left_out)):
            # Better a way that may be gone than none.
            self._paused = {}
        admitted = frozenset(filter(self._has_way, self._left_out))
        self._left_out -= admitted
        return bool(admitted)

    def _has_way(self, name: str) -> bool:
        given = self._given
        return self._remotes[name].has_way(given.dtype, given.on_gpu, self._shut(name))

    def _shut(self, name: str) -> frozenset[str]:
        """The ways to a worker that are not taken."""
        paused = self._paused.get(name, frozenset())
        return paused.union(self._tried[name]) if name in self._tried else paused

    def _send_to(self, remote: Remote, ids: Ids, table: Table) -> None:
        local_ids, rows, slots, experts = route(ids, table)
        if not slots:
            return
        given, layer = self._given, self._layer
        work = Work(
            len(ids), rows, slots, experts, ids.shape[1], given.dtype, self._local_ns, given.on_gpu
        )
        choice = remote.chooser.choose(layer.shapes[remote.name], work, self._shut(remote.name))
        start_ns = time.perf_counter_ns()
        left_s = self._left_s()
        is_asked = left_s is None or left_s > 0
        outcome: Pending | Loss
        try:
            if not is_asked:
                raise DeadlineExceeded(
                    f"no time was left to ask worker {remote.name!r}; allow more (timeout_s)"
                )
            outcome = given.submit(
                remote.clients[choice.transport],
                layer.number,
                local_ids,
                choice,
                self._views[remote.name][choice.transport],
                left_s,
            )
        except (WorkerDied, DeadlineExceeded) as error:
            # Its frames hold on to the session, and to this.
            outcome = error.with_traceback(None)
        self._sent.append(_Sent(remote, ids, table, work, choice, start_ns, outcome, is_asked))

    def _took(self, sent: _Sent) -> bool:
        """Add a call's result; False when it was lost."""
        remote = sent.remote
        try:
            if isinstance(sent.outcome, Loss):
                raise sent.outcome
            self._given.take(sent.outcome)
        except (WorkerDied, DeadlineExceeded) as error:
            self._lost_it(sent, error.with_traceback(None))
            return False
        shape = self._layer.shapes[remote.name]
        taken = sent.outcome.times
        assert taken is not None
        remote.saw(shape, sent.work)
        remote.chooser.observe(shape, sent.work, sent.choice, times_of(taken, sent.choice))
        remote.answered(sent.choice.transport)
        self._reports.succeeded(remote, sent.work, taken)
        return True

    def _lost_it(self, sent: _Sent, error: Loss) -> None:
        remote, way = sent.remote, sent.choice.transport
        if sent.is_asked:
            ways, pause_s = remote.failed(way, error)
            self._tried[remote.name] = self._tried.get(remote.name, frozenset()) | ways
            if remote.name not in self._losses:
                self._reports.failed(remote, way, error, pause_s)
        self._losses[remote.name] = error
        self._left_out |= {remote.name}

    def _left_s(self) -> float | None:
        """Seconds to the deadline of the forward, 0 once it is past; None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _fall_back(self) -> None:
        """Compute here what no worker takes."""
        ids, self._orphans = self._orphans, None
        if ids is None:
            return
        loss = next(reversed(self._losses.values()), None)
        if self._layer.fallback is None:
            assert loss is not None
            raise loss
        self._layer.add_fallback(self._given, ids)
        cause = "worker_down"
        if loss is not None:
            cause = "deadline" if isinstance(loss, DeadlineExceeded) else "worker_died"
        self._reports.fell_back(cause, int(np.count_nonzero(ids >= 0)))
