"""Looks for leaks while everything rests: nobody calls, and no client is open."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence

from . import leaks
from .actors import CallerProcess, Worker
from .leaks import Holding
from .ledger import Ledger

#: What the end of a session may leave for a moment; on a machine that is busy, for longer.
PATIENCE_S = 60.0
#: Rests after which a process has the memory that it needs.
WARM_UP = 3


class Inspection:
    """What processes held when they were new, or rested first, and what of it grows.

    `wait`: until a function is true, or for so many seconds; False then.
    """

    def __init__(
        self, ledger: Ledger, run: str, wait: Callable[[Callable[[], bool], float], bool]
    ) -> None:
        self._ledger = ledger
        self._run = run
        self._wait = wait
        self._segments = leaks.segments()
        #: By pid.
        self._bases: dict[int, Holding] = {}
        #: Of a worker that nobody has used yet.
        self._fresh_worker: Holding | None = None
        self._memory: dict[str, list[int]] = {}
        self._is_told: set[str] = set()
        self.rests = 0

    def know_worker(self, worker: Worker) -> None:
        """What any worker holds that nobody is connected to is what this one holds now."""
        self._fresh_worker = leaks.holding(worker.pid)

    def look(self, workers: Sequence[Worker], callers: Sequence[CallerProcess]) -> None:
        """Once everything rests."""
        self.rests += 1
        known = {process.pid: process.name for process in (*workers, *callers)}
        # All that is left must be so for as long as sessions may take to end.
        self._wait(
            lambda: not self._grown(known, workers) and not self._strangers(known), PATIENCE_S
        )
        for pid, found in self._grown(known, workers).items():
            self._ledger.leak(f"{known[pid]}: {', '.join(found)}")
            self._bases[pid] = leaks.holding(pid)  # told once
        for pid, command in self._strangers(known).items():
            self._ledger.leak(f"process {pid} ({command})")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.look_for_segments(known)
        kept = [workers[0], *(caller for caller in callers if caller.is_kept)]
        for process in kept:
            self._note_memory(process.name, leaks.holding(process.pid).rss_bytes)
        for caller in callers:
            self._bases.setdefault(caller.pid, leaks.holding(caller.pid))

    def look_at_end(self) -> None:
        """Once every process was told to end, and had the time to."""
        left = self._strangers({})
        for pid, command in left.items():
            self._ledger.leak(f"process {pid} ({command})")
        self.look_for_segments(left)

    def look_for_segments(self, ours: dict[int, str]) -> None:
        """Named ones that came since the beginning."""
        for name in leaks.left_segments(self._segments, ours):
            if name not in self._is_told:
                self._is_told.add(name)
                self._ledger.leak(name)

    def growth_bytes(self) -> dict[str, int]:
        """By long-lived process, what it has more in memory than after its warm-up."""
        return {
            name: sizes[-1] - max(sizes[:WARM_UP])
            for name, sizes in self._memory.items()
            if len(sizes) > WARM_UP
        }

    def _grown(self, known: dict[int, str], workers: Sequence[Worker]) -> dict[int, list[str]]:
        if self._fresh_worker is not None:
            for worker in workers:
                self._bases.setdefault(worker.pid, self._fresh_worker)
        found = {}
        for pid in known:
            if pid in self._bases:
                grown = leaks.grown(self._bases[pid], leaks.holding(pid))
                if grown:
                    found[pid] = grown
        return found

    def _strangers(self, known: dict[int, str]) -> dict[int, str]:
        """Processes of the run that should not be."""
        return {
            pid: command
            for pid, command in leaks.processes_of(self._run).items()
            if pid not in known
        }

    def _note_memory(self, name: str, rss_bytes: int) -> None:
        self._memory.setdefault(name, []).append(rss_bytes)
        grown = self.growth_bytes().get(name, 0)
        if grown > leaks.MOST_GROWTH_BYTES and name not in self._is_told:
            self._is_told.add(name)
            self._ledger.leak(
                f"{name}: {grown / 2**20:.1f} MiB more than after its warm-up, and "
                f"{leaks.MOST_GROWTH_BYTES >> 20} are allowed"
            )
