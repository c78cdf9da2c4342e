"""Too little shared memory, too few fds: said with sizes, stepped down from, and survived."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from pathlib import Path

import pytest

import moeshm
from moeshm.errors import HandshakeRefused, MoeshmError
from tests.crash.arithmetic import FREE, MANY_TOKENS, WIDE, assert_exact, make_inputs
from tests.crash.processes import gated_worker


def test_auto_steps_down_to_the_stream_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with gated_worker(tmp_path, max_segment_bytes=1 << 20) as worker:
        with moeshm.connect(worker.address, transport="auto") as client:
            assert client.transport == "stream"
            ((why, n),) = client.stats().stepped_down.items()
            assert n == 1
            assert "bytes cannot be had" in why
            assert any("travel over stream" in each.message for each in caplog.records)
            for inputs in (make_inputs(FREE), make_inputs(WIDE, 1, MANY_TOKENS)):
                assert_exact(client.compute(*inputs), inputs)
        assert "cannot be had" in worker.process.log.read_until("over stream")


def test_who_insists_on_shared_memory_is_refused_with_sizes(tmp_path: Path) -> None:
    with gated_worker(tmp_path, max_segment_bytes=1 << 20) as worker:
        with pytest.raises(HandshakeRefused, match=r"of \d+ bytes cannot be had.*free on.*\d+"):
            moeshm.connect(worker.address, transport="shared")
        assert "got no session" in worker.process.log.read_until("cannot be had")
        with moeshm.connect(worker.address, transport="stream") as client:
            inputs = make_inputs(FREE)
            assert_exact(client.compute(*inputs), inputs)


def test_a_worker_out_of_fds_serves_those_it_has_and_later_others(
    tmp_path: Path, transport: str
) -> None:
    with gated_worker(tmp_path, max_fds=40) as worker, contextlib.ExitStack() as stack:
        clients = []
        with contextlib.suppress(MoeshmError):
            for _ in range(40):
                client = moeshm.connect(worker.address, transport=transport, timeout_s=1.0)
                clients.append(stack.enter_context(client))
        assert 3 <= len(clients) < 40
        for tag, client in enumerate(clients):
            inputs = make_inputs(FREE, tag)
            assert_exact(client.compute(*inputs), inputs)
        for client in clients[1:]:
            client.close()
        for _ in clients[1:]:
            worker.process.log.read_until("session ended after")
        with moeshm.connect(worker.address, transport=transport) as later:
            for client in (clients[0], later):
                inputs = make_inputs(FREE, 77)
                assert_exact(client.compute(*inputs), inputs)


def test_a_full_table_of_fds_does_not_keep_the_worker_busy(tmp_path: Path) -> None:
    """A connection that cannot be accepted stays at the door: it must not be tried all the time."""
    with gated_worker(tmp_path, max_fds=16) as worker, contextlib.ExitStack() as stack:
        for _ in range(20):
            silent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(silent).connect(str(worker.path))
        worker.process.log.read_until("could not be accepted")
        with pytest.raises(subprocess.TimeoutExpired):
            worker.process.wait(0.5)
        worker.process.kill()
        assert worker.process.log.read_rest().count("could not be accepted") < 20


def test_signals_get_through_to_a_worker_out_of_fds(tmp_path: Path) -> None:
    with gated_worker(tmp_path, max_fds=16) as worker, contextlib.ExitStack() as stack:
        for _ in range(20):
            silent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(silent).connect(str(worker.path))
        worker.process.log.read_until("could not be accepted")
        worker.process.signal(signal.SIGTERM)
        stack.close()
        assert worker.process.wait() == 0
