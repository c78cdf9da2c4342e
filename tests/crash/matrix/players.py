"""The processes of a crash matrix: forked, told what to do by a pipe, gone with their parent."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from tests.crash.processes import PATIENCE_S

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Hang(AssertionError):
    """Something took far longer than it may."""


class Player:
    """A process that was forked from this one, and the pipe to it."""

    def __init__(self, name: str, pid: int, pipe: Connection) -> None:
        self.name = name
        self.pid = pid
        self._pipe = pipe
        self._pidfd = os.pidfd_open(pid)
        self._status: int | None = None

    def fileno(self) -> int:
        """Readable when it said something."""
        return self._pipe.fileno()

    def say(self, what: Any) -> None:
        """Tell it; one that is gone does not hear it."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._pipe.send(what)

    def hear(self) -> Any:
        """What it says next; EOFError when it is gone."""
        if not self._pipe.poll(PATIENCE_S):
            self.dump()
            raise Hang(f"{self.name} said nothing for {PATIENCE_S} s")
        try:
            return self._pipe.recv()
        except ConnectionResetError:
            raise EOFError from None

    def signal(self, number: int) -> None:
        """Send a signal."""
        signal.pidfd_send_signal(self._pidfd, number)

    def wait_until_it_stands(self) -> None:
        """Until it is stopped, or gone."""
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def wait(self) -> int:
        """Its exit status; a signal's as a negative number."""
        if self._status is None:
            if not select.select([self._pidfd], [], [], PATIENCE_S)[0]:
                self.dump()
                raise Hang(f"{self.name} still runs after {PATIENCE_S} s")
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pidfd)
            self._pipe.close()
        return self._status

    def dump(self) -> None:
        """Where its threads are, to standard error."""
        print(f"--- {self.name} ({self.pid}) hangs:", file=sys.stderr, flush=True)
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGUSR2)
            # It has to get there before it is killed.
            select.select([self._pidfd], [], [], 1.0)

    def kill(self) -> None:
        """SIGKILL if it still runs, and wait."""
        if self._status is None:
            self.signal(signal.SIGKILL)
            self.wait()


def fork(name: str, body: Callable[[Connection], None], keep: Iterable[int] = ()) -> Player:
    """Let `body` run in a child, which has standard input and output, its pipe and the fds `keep`.

    This process must have one thread, and none of moeshm's objects.
    """
    ours, theirs = Pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                _close_all_but({0, 1, 2, theirs.fileno(), *keep})
                faulthandler.register(signal.SIGUSR2, all_threads=True)
                body(theirs)
                code = 0
        except BaseException:
            print(f"--- {name} ({os.getpid()}):", file=sys.stderr)
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    theirs.close()
    return Player(name, pid, ours)


def _close_all_but(kept: set[int]) -> None:
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in kept:
            with contextlib.suppress(OSError):
                os.close(fd)


def resident_bytes(pid: int) -> int:
    """Memory of a process's own."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGESIZE")
