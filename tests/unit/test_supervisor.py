"""A worker process of one's own is ended, whatever interrupts whoever ends it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moeshm import supervisor
from moeshm.supervisor import WorkerProcess

PATIENCE_S = 30.0
#: Says that it is ready, and does not end when it is told to.
STUBBORN = """
import os, signal, socket, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
    ready.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
time.sleep(60)
"""


@pytest.fixture
def worker(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerProcess]:
    """A stubborn one, which is soon killed."""
    monkeypatch.setattr("tempfile.tempdir", str(short_folder))
    monkeypatch.setattr(supervisor, "_STOP_TIMEOUT_S", 0.05)
    made = WorkerProcess("unused", "cpu", False, None, None, None)
    made._command = [sys.executable, "-c", STUBBORN]
    made.restart()
    yield made
    made._child.end(signal.SIGKILL)


def test_an_interrupted_stop_leaves_the_worker_to_the_next(
    worker: WorkerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (process,) = worker._child.running

    def interrupt(*_arguments: Any) -> list[int]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(supervisor, "_readable", interrupt)
        with pytest.raises(KeyboardInterrupt):
            worker.stop()
    assert worker.is_running()
    worker.stop()
    assert process.popen.returncode == -signal.SIGKILL
    assert not worker.is_running()
    assert list(tmp_path.iterdir()) == []


def test_of_two_threads_that_stop_it_neither_returns_before_its_end(
    worker: WorkerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (process,) = worker._child.running
    is_there, gate, readable = threading.Event(), threading.Event(), supervisor._readable
    found: list[int | None] = []

    def readable_late(fds: list[int], timeout_s: float | None) -> list[int]:
        is_there.set()
        gate.wait(PATIENCE_S)
        return readable(fds, timeout_s)

    def stop() -> None:
        worker.stop()
        found.append(process.popen.returncode)

    monkeypatch.setattr(supervisor, "_readable", readable_late)
    threads = [threading.Thread(target=stop) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert is_there.wait(PATIENCE_S)
    assert found == []
    gate.set()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert found == [-signal.SIGKILL] * 2
    assert list(tmp_path.iterdir()) == []
