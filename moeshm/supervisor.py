"""A worker process of one's own: started, watched until it is ready, restarted, ended."""

from __future__ import annotations

import _thread
import contextlib
import fcntl
import functools
import io
import math
import os
import secrets
import select
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
import weakref
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from . import engine_device as engines
from . import session
from ._role import Monitor
from .backends import Backend
from .choice import choose
from .client import ExpertClient
from .errors import ConnectError, SessionError
from .handshake import SlabWish
from .process import python_module
from .session import Session
from .sessions import Opened

#: Reading and checking a large checkpoint from a slow disk.
START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 10.0
#: How late a thread that waits for a worker may learn that another has ended it.
_LOOK_S = 0.5
#: A worker that is only busy answers a handshake at once; one that hangs does not.
_PROBE_TIMEOUT_S = 1.0
_PREFIX = "moeshm-worker-"
_NEW_FOLDER_S = 60.0
#: A file in the folder; the worker locks the folder itself while it takes its socket's path.
_LOCK = "lock"


def spawn_worker(
    model: str | os.PathLike[str],
    *,
    device: str = "cpu",
    resident: bool = False,
    layers: Collection[int] | None = None,
    experts: Mapping[int, Sequence[int]] | None = None,
    threads: int | None = None,
    transport: str | None = None,
    wire_dtype: str | None = None,
    timeout_s: float | None = None,
    fallback: Backend | None = None,
    engine_device: str | None = None,
) -> ExpertClient:
    """A client of a worker process that it starts, and ends when it is closed.

    `model`, `device`, `resident`, `layers`, `experts` (layer to global ids, in local order) and
    `threads` are those of `moeshm worker`; the rest as for `connect`. A worker that dies is started
    anew by the next call. It ends by itself should this process be killed.

    ConnectError: the worker ended before it was ready; its words are on standard error.
    """
    engine, transport = engines.parse(engine_device, transport)
    chosen = choose(transport, wire_dtype, timeout_s)
    process = WorkerProcess(model, device, resident, layers, experts, threads)

    def open_session(wish: SlabWish) -> Opened:
        def connect(timeout_s: float) -> Session:
            return session.connect(
                process.address, chosen.transport, chosen.batch_capacity, timeout_s, slab=wish
            )

        if process.is_running():
            # One missed deadline is no reason to load a model anew.
            with contextlib.suppress(SessionError, OSError):
                return Opened(connect(_PROBE_TIMEOUT_S), False)
        process.restart()
        return Opened(connect(chosen.timeout_s), True)

    try:
        return ExpertClient(open_session, process.stop, chosen.wire_dtype, fallback, engine=engine)
    except BaseException:
        process.stop()
        raise


class WorkerProcess:
    """`moeshm worker` on a socket in a private folder."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        device: str,
        is_resident: bool,
        layers: Collection[int] | None,
        experts: Mapping[int, Sequence[int]] | None,
        threads: int | None,
    ) -> None:
        _sweep()
        self._child = _Child()
        # Named before it is made, which an interrupt may hide.
        self._folder = Path(tempfile.gettempdir()) / f"{_PREFIX}{secrets.token_urlsafe(6)}"
        locks: list[io.FileIO] = []
        self._held = self._child, self._folder, locks, os.getpid()
        # For a client that is forgotten or whose interpreter ends; not in a forked child.
        self._finalizer = weakref.finalize(self, _clean_up, *self._held)
        self._folder.mkdir(0o700)
        # Held as long as this process lives, whatever pid others know it by.
        locks.append(_open_lock(self._folder, "w"))
        fcntl.flock(locks[0], fcntl.LOCK_EX)
        self.address = f"unix:{self._folder / 'worker.sock'}"
        session.parse_address(self.address)  # TMPDIR may be too long for a socket
        self._command = [
            *python_module("moeshm", "worker", "--until-exit-of", str(os.getpid())),
            "--quiet",
            *("--model", os.fspath(model), "--device", device, "--listen", self.address),
        ]
        if is_resident:
            self._command.append("--resident")
        if layers is not None:
            self._command += ["--layers", ",".join(map(str, layers))]
        if experts is not None:
            file = self._folder / "experts.json"
            file.write_bytes(msgspec.json.encode({n: list(ids) for n, ids in experts.items()}))
            self._command += ["--experts", str(file)]
        if threads is not None:
            self._command += ["--threads", str(threads)]

    def is_running(self) -> bool:
        """True while the worker has not ended; it may hang."""
        return self._child.is_running()

    def restart(self) -> None:
        """Start the worker and wait until it is ready; one that still runs is killed."""
        self._child.end(signal.SIGKILL)
        deadline = time.monotonic() + START_TIMEOUT_S
        path = self._folder / "ready.sock"
        # Of a start that was interrupted.
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            try:
                ready.bind(str(path))
                process = self._child.start(self._command, str(path))
                self._wait_until_ready(process, ready, deadline)
            finally:
                path.unlink(missing_ok=True)

    def _wait_until_ready(self, process: _Process, ready: socket.socket, deadline: float) -> None:
        fds = [ready.fileno(), process.pidfd.fileno()]
        readable: list[int] = []
        has_ended = False
        while not (readable or has_ended) and (left_s := deadline - time.monotonic()) > 0:
            # Another thread may end it, and close its fd before this one looks.
            readable = _readable(fds, min(left_s, _LOOK_S))
            has_ended = process.popen.returncode is not None
        if ready.fileno() in readable:
            return
        self._child.end(signal.SIGKILL)
        if readable or has_ended:
            raise ConnectError(
                f"the worker ended with status {process.popen.returncode} before it was ready; "
                "see what it wrote to standard error"
            )
        raise ConnectError(f"the worker was not ready within {START_TIMEOUT_S:g} s")

    def stop(self) -> None:
        """End the worker and remove its folder; again does nothing, unless it was interrupted."""
        _clean_up(*self._held)
        self._finalizer.detach()


class _Process(NamedTuple):
    """One that was started."""

    popen: subprocess.Popen[bytes]
    #: That of `popen` itself has locks, which an interrupt may leave taken.
    pidfd: io.FileIO

    def is_running(self, patience_s: float | None = 0.0) -> bool:
        """True while it has not ended, which is waited for; it may hang."""
        return not _readable([self.pidfd.fileno()], patience_s)

    def send(self, number: signal.Signals) -> None:
        """Nothing to one that has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd.fileno(), number)

    def reap(self) -> None:
        """Once it has ended; again does nothing."""
        if self.popen.returncode is not None:
            return
        status = 0
        # An interrupt may have come after this: then it is gone.
        with contextlib.suppress(ChildProcessError):
            found = os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG)
            if found is not None:
                was_killed = found.si_code != os.CLD_EXITED
                status = -found.si_status if was_killed else found.si_status
        # Else it would be waited for by its number when it is forgotten.
        self.popen.returncode = status


class _Start:
    """A process that is to be started."""

    def __init__(self, command: list[str], ready: str) -> None:
        self.command = command
        #: Where it says that it is ready.
        self.ready = ready
        self.process: _Process | None = None
        self.error: BaseException | None = None
        self.is_over = False


class _Child:
    """One process at a time, which is known as soon as it is there: whatever interrupts one that
    starts it, `end` ends it."""

    def __init__(self) -> None:
        self._lock = Monitor()
        #: The one whose thread has not come to it yet.
        self._coming: _Start | None = None
        #: The one that runs, if any.
        self.running: list[_Process] = []

    def is_running(self) -> bool:
        """True while it has not ended; it may hang."""
        with self._lock:
            return any(each.is_running() for each in self.running)

    def start(self, command: list[str], ready: str) -> _Process:
        """Start it, in a session of its own. OSError: it cannot be; ConnectError: it was ended
        before it began."""
        start = self._coming = _Start(command, ready)
        # Handlers of signals run in the main thread: what they raise in Popen, after the fork, or
        # as it returns, would lose the process. (`Thread.start` waits, and may be interrupted.)
        _thread.start_new_thread(self._run, (start,))
        with self._lock:
            while not start.is_over:
                self._lock.wait(math.inf)
        if start.error is not None:
            raise start.error
        if start.process is None:
            raise ConnectError("the worker was stopped before it was started")
        return start.process

    def _run(self, start: _Start) -> None:
        with self._lock:
            try:
                if self._coming is start:
                    self._coming = None
                    start.process = _popen(start)
                    self.running.append(start.process)
            except BaseException as error:  # whatever it is, it is whose start it is
                start.error = error
            start.is_over = True
            self._lock.notify_all()

    def end(self, number: signal.Signals) -> None:
        """Send it the signal, if there is one, and wait until it is gone."""
        # One that is being started is waited for, one that is not begun never will be.
        with self._lock:
            self._coming = None
            while self.running:
                process = self.running[0]
                process.send(number)
                process.send(signal.SIGCONT)
                if process.is_running(_STOP_TIMEOUT_S):
                    process.send(signal.SIGKILL)
                    process.is_running(None)
                process.reap()
                # Not before: after an interrupt of the wait it is for whoever comes next.
                self.running.remove(process)
                process.pidfd.close()


def _popen(start: _Start) -> _Process:
    popen = subprocess.Popen(
        start.command,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "NOTIFY_SOCKET": start.ready},
        start_new_session=True,
    )
    try:
        return _Process(popen, io.FileIO(os.pidfd_open(popen.pid)))
    except BaseException:
        popen.kill()
        popen.wait()
        raise


def _readable(fds: list[int], timeout_s: float | None) -> list[int]:
    """Which of them are, once one is; none at the timeout."""
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return [fd for fd, _ in poller.poll(None if timeout_s is None else timeout_s * 1e3)]


def _clean_up(child: _Child, folder: Path, locks: list[io.FileIO], owner: int) -> None:
    if os.getpid() == owner:
        child.end(signal.SIGTERM)
        shutil.rmtree(folder, ignore_errors=True)
        for lock in locks:
            lock.close()


def _open_lock(folder: Path, mode: str) -> io.FileIO:
    """Its file, of which an interrupt loses no fd: what opens it is no function of Python's."""
    return io.FileIO(folder / _LOCK, mode, opener=functools.partial(os.open, mode=0o600))


def _sweep() -> None:
    """Remove the folders that killed processes of this user left: nobody holds their locks."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
            # One that is new may be about to be locked.
            if not is_ours or time.time() - found.st_mtime < _NEW_FOLDER_S:
                continue
            with _open_lock(folder, "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
