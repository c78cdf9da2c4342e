"""A worker process of one's own: started, watched until it is ready, restarted, ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
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

import msgspec

from . import engine_device as engines
from . import session
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
        #: The one that runs, if any.
        self._running: list[subprocess.Popen[bytes]] = []
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # Held as long as this process lives, whatever pid others know it by.
        lock = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # For a client that is forgotten or whose interpreter ends; not in a forked child.
        self._finalizer = weakref.finalize(
            self, _clean_up, self._running, self._folder, lock, os.getpid()
        )
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
        return any(each.poll() is None for each in self._running)

    def restart(self) -> None:
        """Start the worker and wait until it is ready; one that still runs is killed."""
        _end(self._running, signal.SIGKILL)
        deadline = time.monotonic() + START_TIMEOUT_S
        path = self._folder / "ready.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(str(path))
            try:
                process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "NOTIFY_SOCKET": str(path)},
                    start_new_session=True,
                )
                self._running.append(process)
                self._wait_until_ready(process, ready, deadline)
            finally:
                path.unlink()

    def _wait_until_ready(
        self, process: subprocess.Popen[bytes], ready: socket.socket, deadline: float
    ) -> None:
        pidfd = os.pidfd_open(process.pid)
        try:
            left_s = max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([ready.fileno(), pidfd], [], [], left_s)
            is_ready = ready.fileno() in readable
        finally:
            os.close(pidfd)
        if is_ready:
            return
        _end(self._running, signal.SIGKILL)
        if readable:
            raise ConnectError(
                f"the worker ended with status {process.returncode} before it was ready; "
                "see what it wrote to standard error"
            )
        raise ConnectError(f"the worker was not ready within {START_TIMEOUT_S:g} s")

    def stop(self) -> None:
        """End the worker and remove its folder; again does nothing."""
        _end(self._running, signal.SIGTERM)
        self._finalizer()


def _end(running: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    """Send the signal to the worker, if there is one, and wait until it is gone."""
    while running:
        for process in running.copy():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
                process.send_signal(signal.SIGCONT)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            # Not before: after an interrupt of the wait it is for whoever comes next. Another
            # thread may have been faster.
            with contextlib.suppress(ValueError):
                running.remove(process)


def _clean_up(running: list[subprocess.Popen[bytes]], folder: Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:
        _end(running, signal.SIGTERM)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _sweep() -> None:
    """Remove the folders that killed processes of this user left: nobody holds their locks."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
            # One that is new may be about to be locked.
            if not is_ours or time.time() - found.st_mtime < _NEW_FOLDER_S:
                continue
            fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(fd)
