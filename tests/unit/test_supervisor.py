"""A worker process of one's own is ended, whatever interrupts whoever ends it."""

from __future__ import annotations

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
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerProcess]:
    """A stubborn one, which is soon killed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(supervisor, "_STOP_TIMEOUT_S", 0.05)
    made = WorkerProcess("unused", "cpu", False, None, None, None)
    made._command = [sys.executable, "-c", STUBBORN]
    made.restart()
    (process,) = made._running
    yield made
    process.kill()
    process.wait()


def test_an_interrupted_stop_leaves_the_worker_to_the_next(
    worker: WorkerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (process,) = worker._running

    def interrupt(*_arguments: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(process, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            worker.stop()
    assert worker.is_running()
    worker.stop()
    assert process.returncode is not None
    assert not worker.is_running()
    assert list(tmp_path.iterdir()) == []


def test_of_two_threads_that_stop_it_neither_returns_before_its_end(
    worker: WorkerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does either mind that the other was faster."""
    (process,) = worker._running
    is_there, gate, wait = threading.Event(), threading.Event(), process.wait
    failures: list[BaseException] = []

    def wait_late(timeout: float | None = None) -> int:
        if threading.current_thread() is thread:
            is_there.set()
            gate.wait(PATIENCE_S)
        return wait(timeout)

    def stop() -> None:
        try:
            worker.stop()
        except BaseException as error:
            failures.append(error)

    monkeypatch.setattr(process, "wait", wait_late)
    thread = threading.Thread(target=stop)
    thread.start()
    assert is_there.wait(PATIENCE_S)
    worker.stop()
    assert process.returncode is not None
    gate.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert failures == []
    assert list(tmp_path.iterdir()) == []
