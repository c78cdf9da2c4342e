"""Worker and client processes for tests: started, heard, signalled, and gone at the end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.crash.gated_worker import EVENT, QUEUED, TURN

ROOT = Path(__file__).parents[2]
#: No event that a test waits for takes so long, unless something hangs.
PATIENCE_S = 30.0


class Pipe:
    """Bytes from another process, waited for with patience."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._bytes = b""
        #: Of each event.
        self.patience_s = PATIENCE_S

    def read(self, size: int) -> bytes:
        """Exactly so many."""
        while len(self._bytes) < size:
            self._receive()
        taken, self._bytes = self._bytes[:size], self._bytes[size:]
        return taken

    def read_until(self, text: str) -> str:
        """Everything up to the end of the line that holds the text."""
        wanted = text.encode()
        while True:
            at = self._bytes.find(wanted)
            end = self._bytes.find(b"\n", at)
            if at >= 0 and end >= 0:
                return self.read(end + 1).decode()
            self._receive(f"{text!r}")

    def has_more(self, within_s: float) -> bool:
        """Whether there is something to read, now or so soon."""
        return bool(self._bytes) or bool(select.select([self._fd], [], [], within_s)[0])

    def read_rest(self) -> str:
        """Everything until the other side closes."""
        with contextlib.suppress(EOFError):
            while True:
                self._receive()
        taken, self._bytes = self._bytes, b""
        return taken.decode()

    def _receive(self, what: str = "more") -> None:
        if not select.select([self._fd], [], [], self.patience_s)[0]:
            raise AssertionError(f"waited {self.patience_s} s for {what}; so far: {self._bytes!r}")
        try:
            more = os.read(self._fd, 65536)
        except OSError:  # a terminal that the other side left
            more = b""
        if not more:
            raise EOFError(f"no {what} came; the last words: {self._bytes!r}")
        self._bytes += more


class Process:
    """A child process: what it says on both outputs, and its end."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self.pid = popen.pid
        assert popen.stdout is not None
        self.output = Pipe(popen.stdout.fileno())
        #: Its standard error, unless that goes elsewhere.
        self.log = Pipe(-1 if popen.stderr is None else popen.stderr.fileno())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._popen.kill()
        self.wait()

    def stop(self) -> None:
        """SIGSTOP, and wait until it stands still."""
        stop(self.pid)

    def say(self, line: str = "") -> None:
        """Write a line to its standard input."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(f"{line}\n".encode())
        self._popen.stdin.flush()

    def wait(self, limit_s: float = PATIENCE_S) -> int:
        """Its exit status; subprocess.TimeoutExpired when it still runs."""
        return self._popen.wait(limit_s)

    def is_running(self) -> bool:
        """True until it ended."""
        return self._popen.poll() is None


@contextlib.contextmanager
def running(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    stderr: int = subprocess.PIPE,
) -> Iterator[Process]:
    """`python ARGUMENTS` from the repository's root; killed at the end if it still runs."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        pass_fds=pass_fds,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
    ) as popen:
        try:
            yield Process(popen)
        finally:
            popen.kill()


class NotifySocket:
    """The service manager's end of sd_notify(3)."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self.environment = {"NOTIFY_SOCKET": str(path)}

    def receive(self, process: Process) -> str:
        """The next message; the process's last words when it ends without one."""
        pidfd = os.pidfd_open(process.pid)
        give_up_at = time.monotonic() + PATIENCE_S
        try:
            while (left_s := give_up_at - time.monotonic()) > 0:
                readable, _, _ = select.select([self._socket.fileno(), pidfd], [], [], left_s)
                # Never waits here: whatever made it readable, a test must end with a reason.
                with contextlib.suppress(BlockingIOError):
                    return self._socket.recv(4096, socket.MSG_DONTWAIT).decode()
                if pidfd in readable:
                    raise AssertionError(f"not ready: {process.log.read_rest()}")
        finally:
            os.close(pidfd)
        raise AssertionError(f"not ready within {PATIENCE_S:g} s; select saw {readable}")

    def close(self) -> None:
        """Close it."""
        self._socket.close()


class GatedWorker:
    """A `gated_worker` process, ready."""

    def __init__(self, process: Process, address: str, events: int, gate: int) -> None:
        self.process = process
        self.address = address
        self._events = Pipe(events)
        self._gate = gate

    @property
    def path(self) -> Path:
        """Of its socket."""
        return Path(self.address.removeprefix("unix:"))

    def next_event(self) -> tuple[int, int, int]:
        """Kind, layer, tag."""
        kind, layer, tag = EVENT.unpack(self._events.read(EVENT.size))
        return kind, layer, tag

    def has_event(self, within_s: float = 0.01) -> bool:
        """Whether there is one, now or so soon."""
        return self._events.has_more(within_s)

    def next_turn(self) -> tuple[int, int]:
        """Layer and tag of the call that the backend computes next."""
        while True:
            kind, layer, tag = self.next_event()
            if kind == TURN:
                return layer, tag

    def wait_until_queued(self) -> None:
        """Until a session waits for its turn."""
        kind, layer, tag = self.next_event()
        assert kind == QUEUED, f"layer {layer} computes call {tag}"

    def let_go(self, n_calls: int = 1) -> None:
        """Let GATED calls pass, those to come included."""
        os.write(self._gate, b"x" * n_calls)


@contextlib.contextmanager
def gated_worker(
    folder: Path,
    *,
    reply_timeout_s: float = 0,
    max_fds: int = 0,
    max_segment_bytes: int = 0,
    has_gpu: bool = False,
    drain_limit_s: float = 0,
    name: str = "w",
) -> Iterator[GatedWorker]:
    """Start one that listens in the folder; killed at the end."""
    events, events_of_worker = os.pipe()
    gate_of_worker, gate = os.pipe()
    own, its_own = [events, gate], [events_of_worker, gate_of_worker]
    address = f"unix:{folder / name}.sock"
    notify = NotifySocket(folder / f"{name}.notify")
    try:
        with running(
            [
                *("-m", "tests.crash.gated_worker", address),
                *(str(events_of_worker), str(gate_of_worker), str(reply_timeout_s)),
                *(str(max_fds), str(max_segment_bytes), str(int(has_gpu)), str(drain_limit_s)),
            ],
            environment=notify.environment,
            pass_fds=its_own,
        ) as process:
            while its_own:
                os.close(its_own.pop())
            assert notify.receive(process) == "READY=1"
            process.log.read_until("listening at")
            yield GatedWorker(process, address, events, gate)
    finally:
        notify.close()
        for fd in own + its_own:
            os.close(fd)
        (folder / f"{name}.notify").unlink()


@contextlib.contextmanager
def within(limit_s: float) -> Iterator[None]:
    """Coarsely: what takes far longer hung until some deadline."""
    start = time.monotonic()
    yield
    elapsed_s = time.monotonic() - start
    assert elapsed_s < limit_s, f"took {elapsed_s:.1f} s"


def stop(pid: int) -> None:
    """SIGSTOP to a child, and wait until it stands still."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def wait_for_end(pid: int) -> None:
    """Until a process that is not our child is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], PATIENCE_S)[0], f"process {pid} still runs"
    finally:
        os.close(pidfd)


def open_fds(pid: int) -> list[str]:
    """What the fds of a process point to, sorted; those without a fixed name by their kind."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}").partition(":[")[0])
    return sorted(found)


def mapped_rings(pid: int) -> int:
    """How many mappings of anonymous shared memory of ours a process has."""
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:moeshm")
