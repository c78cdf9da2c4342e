"""Injects faults: chooses whom one hits, sends signals, and ends what lasts for a while."""

from __future__ import annotations

import heapq
import itertools
import signal
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from .actors import CallerProcess, Grandchild, Worker
from .hostile import Hostiles
from .ledger import Cause, Ledger
from .schedule import Fault

#: How long calls may fail that met a caller's worker being killed, which the next one restarts.
_KILLED_S = 1.0
_HOSTILE = "hostile: "

_Any = TypeVar("_Any")


class Injector:
    """Of these workers the first is never ended. Used by one thread."""

    def __init__(
        self, ledger: Ledger, workers: Sequence[Worker], callers: Sequence[CallerProcess]
    ) -> None:
        self._ledger = ledger
        self._workers = workers
        self._callers = callers
        self._hostiles = Hostiles()
        #: Callers' workers that stand still.
        self._stopped: set[int] = set()
        #: When, a number that no other has, and what.
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        #: No caller is killed now, so that it can be compared with what it was.
        self.spares_callers = False

    def inject(self, fault: Fault) -> None:
        """Do it now; one that finds nobody whom it could hit is left out."""
        if fault.kind.startswith(_HOSTILE):
            self._attack(fault)
        elif fault.kind.startswith("own worker"):
            self._hit_own_worker(fault)
        elif fault.kind.startswith("caller"):
            self._hit_caller(fault)
        else:
            self._hit_worker(fault)

    def step(self) -> None:
        """End what has lasted long enough."""
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            heapq.heappop(self._due)[2]()
        for name, count in self._hostiles.made.copy().items():
            self._ledger.faults[f"{_HOSTILE}{name}"] = count

    def end_all(self) -> None:
        """End all that lasts, at once, and wait for hostile peers."""
        while self._due:
            heapq.heappop(self._due)[2]()
        self._hostiles.rest()

    def _attack(self, fault: Fault) -> None:
        worker = _pick(self._workers, fault.draw)
        assert worker is not None
        name = fault.kind.removeprefix(_HOSTILE)
        # Counted once all of it was sent.
        self._ledger.note(f"{fault.kind}: {worker.name}")
        self._hostiles.attack(name, str(worker.path), int(fault.draw * 2**53))

    def _hit_worker(self, fault: Fault) -> None:
        may_end = fault.kind != "worker stopped"
        able = [
            worker
            for worker in self._workers[may_end:]
            if worker.is_ready and not worker.is_stopped
        ]
        worker = _pick(able, fault.draw)
        if worker is None:
            return
        cause = self._ledger.fault(fault.kind, worker.name)
        if fault.kind == "worker killed":
            self._end_worker(worker, signal.SIGKILL, cause)
        elif fault.kind == "worker ended by SIGTERM":
            self._end_worker(worker, signal.SIGTERM, cause)
        else:
            worker.signal(signal.SIGSTOP)

            def let_go() -> None:
                if fault.kind == "worker stopped":
                    worker.signal(signal.SIGCONT)
                    cause.end = time.monotonic()
                else:
                    self._end_worker(worker, signal.SIGKILL, cause)

            self._after(fault.for_s, let_go)

    def _end_worker(self, worker: Worker, number: signal.Signals, cause: Cause) -> None:
        """It is started again when it has ended; until then its calls may fail."""
        worker.is_ready = False
        worker.cause = cause
        worker.signal(number, number.name)

    def _hit_own_worker(self, fault: Fault) -> None:
        able = [
            (caller, pid)
            for caller in self._callers
            if not caller.is_resting
            for pid in caller.own_workers()
            if pid not in self._stopped
        ]
        hit = _pick(able, fault.draw)
        if hit is None:
            return
        caller, pid = hit
        try:
            worker = Grandchild(pid, caller.pid)
        except ProcessLookupError:
            return
        cause = self._ledger.fault(fault.kind, caller.own)
        worker.signal(signal.SIGKILL if fault.kind == "own worker killed" else signal.SIGSTOP)
        self._stopped.add(pid)

        def let_go() -> None:
            self._stopped.discard(pid)
            is_stop = fault.kind == "own worker stopped"
            worker.signal(signal.SIGCONT if is_stop else signal.SIGKILL)
            worker.close()
            cause.end = time.monotonic() + (0.0 if is_stop else _KILLED_S)

        if fault.kind == "own worker killed":
            let_go()
        else:
            self._after(fault.for_s, let_go)

    def _hit_caller(self, fault: Fault) -> None:
        is_kill = fault.kind == "caller killed"
        able = [
            caller
            for caller in self._callers
            if not (caller.is_resting or caller.is_stopped or caller.why_gone)
            and caller.is_calling
            and not (is_kill and (caller.is_kept or self.spares_callers))
        ]
        caller = _pick(able, fault.draw)
        if caller is None:
            return
        cause = self._ledger.fault(fault.kind, caller.name)
        if is_kill:
            cause.end = time.monotonic()
            caller.signal(signal.SIGKILL, fault.kind)
            return
        caller.signal(signal.SIGSTOP)

        def let_go() -> None:
            caller.signal(signal.SIGCONT)
            cause.end = caller.heard = time.monotonic()

        self._after(fault.for_s, let_go)

    def _after(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), do))


def _pick(able: Sequence[_Any], draw: float) -> _Any | None:
    return able[int(draw * len(able))] if able else None
