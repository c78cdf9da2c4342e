"""A worker process of one's own: started, watched until it is ready, restarted, ended."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import msgspec

from . import client, session
from .backends import Backend
from .client import ExpertClient, Opened
from .errors import ConnectError

#: Reading and checking a large checkpoint from a slow disk.
START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 10.0


def spawn_worker(
    model: str | os.PathLike[str],
    *,
    device: str = "cpu",
    layers: Collection[int] | None = None,
    experts: Mapping[int, Sequence[int]] | None = None,
    threads: int | None = None,
    transport: str | None = None,
    wire_dtype: str | None = None,
    timeout_s: float | None = None,
    fallback: Backend | None = None,
) -> ExpertClient:
    """A client of a worker process that it starts, and ends when it is closed.

    `model`, `device`, `layers`, `experts` (layer to global ids, in local order) and `threads` are
    those of `moeshm worker`; the rest as for `connect`. A worker that dies is started anew by the
    next call. It ends by itself should this process be killed.

    ConnectError: the worker ended before it was ready; its words are on standard error.
    """
    chosen = client.choose(transport, wire_dtype, timeout_s)
    process = WorkerProcess(model, device, layers, experts, threads)

    def open_session() -> Opened:
        is_new = process.ensure()
        return Opened(
            session.connect(
                process.address, chosen.transport, chosen.batch_capacity, chosen.timeout_s
            ),
            is_new,
        )

    try:
        return ExpertClient(open_session, process.stop, chosen.wire_dtype, fallback)
    except BaseException:
        process.stop()
        raise


class WorkerProcess:
    """`moeshm worker` on a socket in a private folder."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        device: str,
        layers: Collection[int] | None,
        experts: Mapping[int, Sequence[int]] | None,
        threads: int | None,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="moeshm-worker-"))
        self.address = f"unix:{self._folder / 'worker.sock'}"
        self._command = [
            sys.executable,
            *("-m", "moeshm", "worker", "--until-stdin-closes", "--quiet"),
            *("--model", os.fspath(model), "--device", device, "--listen", self.address),
        ]
        if layers is not None:
            self._command += ["--layers", ",".join(map(str, layers))]
        if experts is not None:
            file = self._folder / "experts.json"
            file.write_bytes(msgspec.json.encode({n: list(ids) for n, ids in experts.items()}))
            self._command += ["--experts", str(file)]
        if threads is not None:
            self._command += ["--threads", str(threads)]
        self._process: subprocess.Popen[bytes] | None = None
        # Also when the interpreter ends without close(), but not in a forked child.
        self._finalizer = weakref.finalize(self, _remove, self._folder, os.getpid())

    def ensure(self) -> bool:
        """Start the worker unless it runs, and wait until it is ready; whether it was started.

        A worker that is stopped or hangs is killed: the session with it was given up.
        """
        self._end(signal.SIGKILL)
        deadline = time.monotonic() + START_TIMEOUT_S
        path = self._folder / "ready.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(str(path))
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    env={**os.environ, "NOTIFY_SOCKET": str(path)},
                    start_new_session=True,
                )
                self._wait_until_ready(self._process, ready, deadline)
            finally:
                path.unlink()
        return True

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
        self._end(signal.SIGKILL)
        if readable:
            raise ConnectError(
                f"the worker ended with status {process.returncode} before it was ready; "
                "see what it wrote to standard error"
            )
        raise ConnectError(f"the worker was not ready within {START_TIMEOUT_S:g} s")

    def stop(self) -> None:
        """End the worker and remove its folder; again does nothing."""
        self._end(signal.SIGTERM)
        self._finalizer()

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        # Its lifeline, too.
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
