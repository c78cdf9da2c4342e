"""Looks for leaks while everything rests: nobody calls, and no client is open."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from .. import process
from . import leaks
from .actors import CallerProcess, Process, Worker
from .leaks import Holding
from .ledger import Ledger

#: What the end of a session may leave for a moment; on a machine that is busy, for longer.
PATIENCE_S = 60.0
#: Rests after which a process has the memory that it needs.
WARM_UP = 3

#: A process by its pid and start time: a pid is another's later.
_Identity = tuple[int, int]


class Inspection:
    """What processes held when they were new, or rested first, and what of it grows.

    `wait`: until a function is true, or for so many seconds; False then. `folder`: that of
    temporary files.
    """

    def __init__(
        self,
        ledger: Ledger,
        run: str,
        wait: Callable[[Callable[[], bool], float], bool],
        folder: Path,
    ) -> None:
        self._ledger = ledger
        self._run = run
        self._wait = wait
        self._folder = folder
        self._segments = leaks.segments()
        self._worker_folders: frozenset[str] = frozenset()
        self._bases: dict[_Identity, Holding] = {}
        #: All processes that the run was seen to have.
        self._ours = {os.getpid()}
        #: Of a worker that nobody has used yet.
        self._fresh_worker: Holding | None = None
        self._memory: dict[str, list[int]] = {}
        self._is_told: set[str] = set()
        self.rests = 0
        #: By role, how often a process was held against what it was.
        self.compared: Counter[str] = Counter()

    def know_worker(self, worker: Worker) -> None:
        """What any worker holds that nobody is connected to is what this one holds now."""
        self._fresh_worker = leaks.holding(worker.pid)

    def notice(self) -> None:
        """See which processes there are; those that end soon are missed."""
        self._ours.update(leaks.processes_of(self._run))

    def look(
        self, workers: Sequence[Worker], callers: Sequence[CallerProcess], is_quiet: bool = False
    ) -> None:
        """Once everything rests. `is_quiet`: no caller was killed since the last time."""
        self.rests += 1
        processes = (*workers, *callers)
        left = self._wait_and_find(processes, workers, is_quiet)
        for what, found in left.items():
            self._ledger.leak(f"{what}: {', '.join(found)}" if found else what)
        for pid in self._strangers(processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.look_for_segments({each.pid for each in processes})
        self._worker_folders = leaks.worker_folders(self._folder)
        for each, now in self._held(processes).items():
            base = self._bases.get(_identity(each))
            if base is not None:
                self.compared[each.role] += 1
            # Not what a process holds that only starts; what it has more is told once.
            if (base is None and each.is_used) or (base is not None and leaks.grown(base, now)):
                self._bases[_identity(each)] = now
            if each.is_kept:
                self._note_memory(each.name, now.anonymous_bytes)
        present = {_identity(each) for each in processes}
        self._bases = {key: base for key, base in self._bases.items() if key in present}

    def look_at_end(self) -> None:
        """Once every process was told to end, and had the time to."""
        left = self._strangers(())
        for pid, command in left.items():
            self._ledger.leak(f"process {pid} ({command})")
        self.look_for_segments(left)

    def look_for_segments(self, living: Iterable[int]) -> None:
        """Named ones that came since the beginning."""
        self._ours.update(living)
        for name in leaks.left_segments(self._segments, self._ours):
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

    def _wait_and_find(
        self, processes: Sequence[Process], workers: Sequence[Worker], is_quiet: bool
    ) -> dict[str, list[str]]:
        """What is left after sessions had the time to end, by what it is or who has it."""

        def find() -> dict[str, list[str]]:
            found: dict[str, list[str]] = {}
            if self._fresh_worker is not None:
                for worker in workers:
                    self._bases.setdefault(_identity(worker), self._fresh_worker)
            for each, now in self._held(processes).items():
                base = self._bases.get(_identity(each))
                grown = [] if base is None else leaks.grown(base, now)
                grown += [f"a zombie child, {pid}" for pid in leaks.zombies_of(each.pid)]
                if grown:
                    found[each.name] = grown
            for pid, command in self._strangers(processes).items():
                found[f"process {pid} ({command})"] = []
            if is_quiet:
                for name in sorted(leaks.worker_folders(self._folder) - self._worker_folders):
                    found[f"the folder {name}, and nobody has its lock"] = []
            return found

        self._wait(lambda: not find(), PATIENCE_S)
        return find()

    def _held(self, processes: Sequence[Process]) -> dict[Process, Holding]:
        """Who is gone by now is left out."""
        found = {}
        for each in processes:
            with contextlib.suppress(OSError):
                found[each] = leaks.holding(each.pid)
        return found

    def _strangers(self, known: Sequence[Process]) -> Mapping[int, str]:
        """Processes of the run that should not be."""
        pids = {each.pid for each in known}
        return {
            pid: command
            for pid, command in leaks.processes_of(self._run).items()
            if pid not in pids
        }

    def _note_memory(self, name: str, n_bytes: int) -> None:
        self._memory.setdefault(name, []).append(n_bytes)
        grown = self.growth_bytes().get(name, 0)
        if grown > leaks.MOST_GROWTH_BYTES and name not in self._is_told:
            self._is_told.add(name)
            self._ledger.leak(
                f"{name}: {grown / 2**20:.1f} MiB more than after its warm-up, and "
                f"{leaks.MOST_GROWTH_BYTES >> 20} are allowed"
            )


def _identity(each: Process) -> _Identity:
    return each.pid, process.start_ticks(each.pid)
