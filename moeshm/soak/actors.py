"""The processes of a soak: workers that listen, and callers. Each can be killed, stopped, ended."""

from __future__ import annotations

import abc
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from ..process import python_module
from . import leaks
from .ledger import Cause
from .messages import Lines, Message, Order

#: What a process may take to end once it was told to: workers drain for up to 30 s.
END_LIMIT_S = 60.0
_LAST_WORDS_BYTES = 1500


class Process(abc.ABC):
    """A child in a session of its own, whose output goes to a file."""

    def __init__(self, name: str, role: str, is_kept: bool, log: Path) -> None:
        self.name = name
        #: What others that do the same have in common.
        self.role = role
        #: Never ended, so that what it leaks adds up.
        self.is_kept = is_kept
        self._log = log
        self._popen: subprocess.Popen[bytes] | None = None
        #: True while it stands still by our hand.
        self.is_stopped = False
        #: Why it may be gone; empty when nobody told it to end.
        self.why_gone = ""
        #: How often it ended by itself.
        self.n_bad_ends = 0

    @property
    @abc.abstractmethod
    def is_used(self) -> bool:
        """True once it does what it was started for."""

    @property
    def pid(self) -> int:
        """Of the process that runs; 0 for none."""
        return 0 if self._popen is None else self._popen.pid

    def begin(
        self, arguments: list[str], environment: dict[str, str], fds: tuple[int, ...]
    ) -> None:
        """Start `python ARGUMENTS`; it can read the orders that `say` writes."""
        self.why_gone = ""
        self.is_stopped = False
        with self._log.open("ab") as log:
            self._popen = subprocess.Popen(
                python_module(*arguments),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                pass_fds=fds,
                start_new_session=True,
            )

    def signal(self, number: signal.Signals, why_gone: str = "") -> None:
        """Send one; `why_gone`: it may end by that."""
        if why_gone:
            self.why_gone = why_gone
        if number in (signal.SIGSTOP, signal.SIGCONT):
            self.is_stopped = number == signal.SIGSTOP
        if self._popen is not None:
            self._popen.send_signal(number)

    def say(self, line: str) -> None:
        """A line to its standard input; one that is gone does not hear it."""
        if self._popen is not None and self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.write(f"{line}\n".encode())
                self._popen.stdin.flush()

    def hang_up(self) -> None:
        """End its standard input."""
        if self._popen is not None and self._popen.stdin is not None:
            stdin: IO[bytes] = self._popen.stdin
            with contextlib.suppress(BrokenPipeError):
                stdin.close()

    def status(self) -> int | None:
        """Its exit status, once; None while it runs, or when it was asked for before."""
        if self._popen is None:
            return None
        status = self._popen.poll()
        if status is not None:
            self.hang_up()
            self._popen = None
        return status

    def wait(self, limit_s: float) -> int | None:
        """Its exit status; None when it still runs then, or was gone before."""
        deadline = time.monotonic() + limit_s
        while self.pid:
            status = self.status()
            if status is not None:
                return status
            if time.monotonic() > deadline:
                return None
            time.sleep(0.01)
        return None

    def last_words(self) -> str:
        """The end of what it wrote."""
        with contextlib.suppress(OSError), self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - _LAST_WORDS_BYTES))
            return log.read().decode(errors="replace").strip()
        return ""

    def close(self) -> None:  # noqa: B027
        """Free what this process has of it: nothing, of most."""


class Worker(Process):
    """`moeshm worker --listen`, as an operator runs it."""

    def __init__(
        self,
        name: str,
        is_kept: bool,
        folder: Path,
        options: list[str],
        environment: dict[str, str],
    ) -> None:
        super().__init__(name, name, is_kept, folder / f"{name}.log")
        self.path = folder / f"{name}.sock"
        self._notify_path = folder / f"{name}.ready"
        self._options = options
        self._environment = environment
        self._notify: socket.socket | None = None
        self.is_ready = False
        #: Lasts while it is down.
        self.cause: Cause | None = None

    @property
    def is_used(self) -> bool:
        """As `Process.is_used`."""
        return self.is_ready

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"unix:{self.path}"

    def start(self) -> None:
        """Begin; `look` says when it is ready."""
        self._close_notify()
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.setblocking(False)
        self._notify.bind(str(self._notify_path))
        self.is_ready = False
        parent = ["--until-exit-of", str(os.getpid())]
        arguments = ["moeshm", "worker", "--listen", self.address, "--quiet", *parent]
        environment = {**self._environment, "NOTIFY_SOCKET": str(self._notify_path)}
        self.begin([*arguments, *self._options], environment, ())

    def look(self) -> bool:
        """True once, when it has become ready."""
        if self._notify is None:
            return False
        try:
            said = self._notify.recv(4096)
        except BlockingIOError:
            return False
        if said != b"READY=1":
            return False
        self.is_ready = True
        self._close_notify()
        return True

    def _close_notify(self) -> None:
        if self._notify is not None:
            self._notify.close()
            self._notify = None
        self._notify_path.unlink(missing_ok=True)

    def close(self) -> None:
        """As `Process.close`."""
        self._close_notify()


class CallerProcess(Process):
    """A calling process: what it says, and since when it says nothing."""

    def __init__(self, number: int, role: str, is_kept: bool, folder: Path) -> None:
        super().__init__(f"caller {number}", role, is_kept, folder / f"caller-{number}.log")
        self.number = number
        self.own = f"own worker of caller {number}"
        self.is_resting = True
        #: Once its clients were open.
        self.is_calling = False
        #: Until it has said something: it only starts.
        self.is_new = True
        self.heard = 0.0
        self._fd = -1
        self._lines = Lines()

    @property
    def is_used(self) -> bool:
        """As `Process.is_used`."""
        return self.is_calling

    def start(self, order: Order, environment: dict[str, str]) -> None:
        """Begin with this order; it rests until it is told to `go`."""
        self.close()
        self._fd, its_fd = os.pipe()
        os.set_blocking(self._fd, False)
        try:
            arguments = ["moeshm.soak.caller", str(its_fd)]
            self.begin(arguments, environment, (its_fd,))
        finally:
            os.close(its_fd)
        self.say(msgspec.json.encode(order).decode())
        self.is_resting = True
        self.is_calling = False
        self.is_new = True
        self.heard = time.monotonic()
        self._lines = Lines()

    def go(self) -> None:
        """Let it call."""
        self.is_resting = False
        self.say("go")

    def fileno(self) -> int:
        """Readable when it has said something; -1 for none."""
        return self._fd

    def hear(self) -> Iterator[Message]:
        """What it said since it was heard last."""
        while self._fd >= 0:
            try:
                data = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                return
            self.heard = time.monotonic()
            self.is_new = False
            yield from self._lines.feed(data)

    def own_workers(self) -> list[int]:
        """The workers that it started, as it sees them."""
        found = []
        for pid in leaks.children_of(self.pid) if self.pid else ():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"moeshm" in words and b"worker" in words:
                    found.append(pid)
        return sorted(found)

    def close(self) -> None:
        """As `Process.close`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Grandchild:
    """A caller's worker, which somebody else may wait for at any time."""

    def __init__(self, pid: int, parent: int) -> None:
        self._pidfd = os.pidfd_open(pid)
        # Its number may be another's by now.
        if pid not in leaks.children_of(parent):
            self.close()
            raise ProcessLookupError(f"process {pid} is gone")

    def signal(self, number: signal.Signals) -> None:
        """Send one; who is gone does not get it."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._pidfd)
