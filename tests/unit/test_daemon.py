"""The life of a daemon: who it lets in, how it ends, and what it tells a service manager."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from moeshm import daemon, process, protocol, refusals, session
from moeshm.daemon import Daemon, notify_systemd
from moeshm.errors import SettingError
from moeshm.layers import LayerInfo
from moeshm.settings import Settings
from tests.crash.arithmetic import ArithmeticBackend
from tests.wire import PATIENCE_S


def listen(path: Path) -> Daemon:
    return Daemon(ArithmeticBackend(), f"unix:{path}")


def close(served: Daemon) -> None:
    """What `run` does at the end."""
    served._listener.close()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Where daemons listen."""
    yield tmp_path / "w.sock"
    assert os.listdir(tmp_path) in ([], ["w.sock"])


# --- the address ---------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["/run/w.sock", "unix:", "tcp:host:1", "unix:" + "x" * 108])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(SettingError):
        Daemon(ArithmeticBackend(), address)


# --- the end ------------------------------------------------------------------------------


def test_run_puts_the_signals_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    served = listen(path)
    # It is received once the handlers are there, and not before.
    monkeypatch.setattr(
        daemon, "notify_systemd", lambda state: state == "READY=1" and _raise(signal.SIGTERM)
    )
    served.run()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.set_wakeup_fd(-1) == -1
    assert not path.exists()


def _raise(number: signal.Signals) -> bool:
    os.kill(os.getpid(), number)
    return True


def test_it_ends_with_whoever_started_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    pidfd = os.pidfd_open(pid)
    try:
        Daemon(ArithmeticBackend(), f"unix:{path}", lifeline=pidfd).run()
    finally:
        os.close(pidfd)
        os.waitpid(pid, 0)
    assert not path.exists()


class StuckThread:
    """A session that does not end; what `join` waits passes on a clock."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock

    def join(self, timeout_s: float) -> None:
        self._clock[0] += timeout_s

    def is_alive(self) -> bool:
        return True


def test_all_sessions_together_get_the_time_to_drain(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = listen(path)
    close(served)
    clock = [1000.0]
    monkeypatch.setattr(daemon, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    served._threads = {StuckThread(clock) for _ in range(3)}  # type: ignore[misc]
    served._drain()
    assert clock[0] == 1000.0 + daemon.DRAIN_TIMEOUT_S
    assert len(caplog.records) == 3


def test_a_connection_that_no_thread_can_serve_ends_itself_only(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "moeshm-session":
            raise RuntimeError("can't start new thread")
        start(thread)

    served = listen(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(path))
        monkeypatch.setattr(threading.Thread, "start", refuse)
        served._accept()
        assert b"the worker has no thread" in client.recv(1000)
        assert client.recv(1) == b""
        assert not served._admissions._here
    served._drain()
    assert "got no session: the worker has no thread" in caplog.text
    close(served)


def connect(path: Path) -> socket.socket:
    """A client."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(str(path))
    return client


def test_refusals_that_nobody_can_tell_keep_no_thread_and_are_not_without_end(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread that accepts goes on; at some point it accepts no more, until they are told."""
    gate, inside = threading.Event(), threading.Semaphore(0)
    told: list[int] = []

    def refuse(sock: socket.socket, _: Exception) -> None:
        inside.release()
        gate.wait()
        sock.close()
        told.append(1)

    monkeypatch.setattr(refusals, "_MOST_THREADS", 2)
    monkeypatch.setattr(refusals, "_MOST_WAITING", 3)
    monkeypatch.setattr(daemon, "_ACCEPT_PAUSE_S", 0.0)
    monkeypatch.setattr(session, "refuse", refuse)
    served = listen(path)
    served._admissions.settings = Settings(max_sessions_per_process=1)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(connect(path))
        served._accept()
        for number in range(6):
            stack.enter_context(connect(path))
            served._accept()
            # Two are in the hands of a thread, three wait, and one is not accepted.
            if number < 2:
                inside.acquire()
        assert not served._refusals.has_room()
        assert "no more are accepted" in caplog.text
        gate.set()
        served._refusals.finish(PATIENCE_S)
        assert served._refusals.has_room()
        assert len(told) == 5
        first.close()
        served._drain()
    close(served)


def test_a_death_that_is_not_watched_for_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "open_pidfd", lambda _pid, _ticks=0: -1)
    served = listen(path)
    with connect(path):
        served._accept()
    served._drain()
    assert "its death is not watched for" in caplog.text
    close(served)


# --- the service manager ------------------------------------------------------------------


@pytest.mark.parametrize("is_abstract", [False, True])
def test_notify_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_abstract: bool) -> None:
    name = f"moeshm-test-{os.getpid()}" if is_abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name if is_abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if is_abstract else name)
        notify_systemd("READY=1")
        assert manager.recv(100) == b"READY=1"


@pytest.mark.parametrize("value", ["", "/nowhere/notify", "@nobody-listens-here"])
def test_no_service_manager_is_no_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", value)
    notify_systemd("READY=1")


# --- calls' size --------------------------------------------------------------------------


@pytest.mark.parametrize(("free_bytes", "most"), [(0, 1), (1 << 20, 12), (1 << 50, 4096)])
def test_a_call_takes_a_share_of_the_memory_that_is_free(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int, most: int
) -> None:
    monkeypatch.setattr(process, "available_memory", lambda: free_bytes)
    backend = ArithmeticBackend()
    info = LayerInfo(
        hidden_size=256, intermediate_size=128, num_experts=4, top_k=2, experts=(0, 1, 2, 3)
    )
    # 4 x (256 x (2 + 2) + 2 x 128) bytes a token, of a sixteenth.
    backend.layers = {0: info}
    assert daemon._max_tokens(backend) == most
    assert most <= protocol.MAX_TOKENS
