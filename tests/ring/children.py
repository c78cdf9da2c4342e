"""Processes at the other end of a ring: `python -m tests.ring.jobs JOB ARGUMENTS`."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.ring.rings import PATIENCE_S

ROOT = Path(__file__).parents[2]


class Child:
    """A process that does a job; it speaks in lines, and a line or the end is what it waits for."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self.pid = popen.pid

    def line(self) -> str:
        """The next line that it says; what it wrote to standard error when it ends without."""
        assert self._popen.stdout is not None
        assert select.select([self._popen.stdout], [], [], PATIENCE_S)[0], "the child is silent"
        line = self._popen.stdout.readline().decode()
        assert line, f"the child ended: {self.last_words()}"
        return line.strip()

    def go_on(self) -> None:
        """Let it go on from where it waits."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._popen.kill()
        self._popen.wait(PATIENCE_S)

    def finish(self) -> str:
        """Wait for its success; the rest of what it said."""
        assert self._popen.stdout is not None
        said = self._popen.stdout.read().decode()
        words = self.last_words()
        assert self._popen.returncode == 0, f"status {self._popen.returncode}: {words}"
        assert not words, words
        return said

    def last_words(self) -> str:
        """What it wrote to standard error, once it has ended."""
        assert self._popen.stderr is not None
        words = self._popen.stderr.read().decode()
        self._popen.wait(PATIENCE_S)
        return words


@contextlib.contextmanager
def child(
    job: str, *arguments: object, fds: Sequence[int] = (), prefix: Sequence[str] = ()
) -> Iterator[Child]:
    """A process that does the job, killed at the end if it still runs.

    `fds` stay open in it; `prefix` is a command that runs it.
    """
    command = [*prefix, sys.executable, "-m", "tests.ring.jobs", job, *map(str, arguments)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        pass_fds=fds,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as popen:
        try:
            yield Child(popen)
        finally:
            popen.kill()
