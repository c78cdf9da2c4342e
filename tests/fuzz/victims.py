"""A process under attack: alive, no larger, and with no more fds or threads than it should have."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import psutil

from tests.crash.processes import Process, open_fds, running
from tests.ring.rings import until

#: Coarse: allocators keep what they were given back, and sanitizers keep it longer.
_MOST_GROWTH_BYTES = 200 << 20


class Victim:
    """A process, its folder and what it wrote to its log."""

    def __init__(self, module: str, *arguments: str, ready: str = "") -> None:
        self._stack = contextlib.ExitStack()
        try:
            self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            self._log = self._stack.enter_context((self.folder / "log").open("w+b"))
            self.process: Process = self._stack.enter_context(
                running(
                    ["-m", module, *(each.format(folder=self.folder) for each in arguments)],
                    stderr=self._log.fileno(),
                )
            )
            until(lambda: ready in self._read_log() or not self.process.is_running())
            self.check_alive()
        except BaseException:
            self._stack.close()
            raise
        self._at = psutil.Process(self.process.pid)
        self._most_bytes = 0
        self._fds: list[str] = []
        self._n_threads = 0
        self._n_read = 0

    def remember(self) -> None:
        """What it is like with none but its usual sessions."""
        self._fds, self._n_threads = self._now()
        self._most_bytes = self._at.memory_info().rss + _MOST_GROWTH_BYTES

    def check(self) -> None:
        """It is still like that, or is again in a moment, and its log has no surprise."""
        self.check_alive()
        until(lambda: self._now() == (self._fds, self._n_threads))
        size = self._at.memory_info().rss
        assert size < self._most_bytes, f"{size} bytes of memory"
        self._check_log()

    def check_alive(self) -> None:
        """It runs."""
        assert self.process.is_running(), f"it ended: {self._read_log()[-4000:]}"

    def _now(self) -> tuple[list[str], int]:
        return open_fds(self.process.pid), self._at.num_threads()

    def _check_log(self) -> None:
        """Of what was escaped; a backend may choke on numbers, and that is said before."""
        log = self._read_log(self._n_read)
        self._n_read += len(log)
        assert log.count("Traceback") == log.count("the backend failed"), log[-4000:]
        assert "runtime error" not in log, log[-4000:]

    def _read_log(self, since: int = 0) -> str:
        # In bytes of ASCII, mostly; a mark may be cut in two, and is then not found once.
        return os.pread(self._log.fileno(), 1 << 24, since).decode("ascii", "replace")

    def close(self) -> None:
        """Kill it."""
        self._stack.close()
