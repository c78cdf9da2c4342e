"""Rings that are registered with a GPU are let go of before they are unmapped, however it ends."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import moeshm
from moeshm.demo import tiny_moe_path
from moeshm.errors import WorkerFailed
from tests.crash.lost_gpu_worker import FAILING, FATAL
from tests.crash.processes import NotifySocket, Process, mapped_rings, running
from tests.crash.registering_worker import COMPUTED, COMPUTING, GATED, REGISTERED, UNREGISTERED
from tests.crash.test_gpu_lost import compute
from tests.hostile.attacker import PRODUCER_WORD, attacking, hello

#: Connects, sends a call of so many tokens, says so, and waits.
VICTIM = """
import sys
import numpy as np
import moeshm

address, n_tokens = sys.argv[1], int(sys.argv[2])
client = moeshm.connect(address, transport="shared")
ids = np.zeros((n_tokens, 4), np.int32)
call = client.submit(1, np.zeros((n_tokens, 128), np.float32), ids, np.ones(ids.shape, np.float32))
print("submitted", flush=True)
sys.stdin.readline()
"""


class Worker:
    """A worker that is ready, and its gate."""

    def __init__(self, process: Process, address: str, gate: int) -> None:
        self.process = process
        self.address = address
        self.gate = gate

    def events(self, end: str = "session ended after") -> list[str]:
        """What happened to memory and calls until the log says that."""
        text = self.process.log.read_until(end)
        words = "|".join((REGISTERED, UNREGISTERED, COMPUTING, COMPUTED))
        return [found.strip() for found in re.findall(rf"INFO ({words})", text)]


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    """One that has warmed up."""
    notify = NotifySocket(tmp_path / "notify")
    (tmp_path / "experts.json").write_text('{"1": "0-7"}')
    gate_of_worker, gate = os.pipe()
    address = f"unix:{tmp_path / 'w.sock'}"
    command = ["-m", "tests.crash.registering_worker", str(gate_of_worker)]
    command += ["--model", str(tiny_moe_path()), "--experts", str(tmp_path / "experts.json")]
    command += ["--device", "cuda:0", "--listen", address]
    try:
        with running(command, environment=notify.environment, pass_fds=[gate_of_worker]) as process:
            assert notify.receive(process) == "READY=1"
            yield Worker(process, address, gate)
    finally:
        notify.close()
        os.close(gate_of_worker)
        os.close(gate)


BOTH_WAYS = [REGISTERED.strip()] * 2
AND_BACK = [UNREGISTERED.strip()] * 2


def test_a_client_that_closes(worker: Worker) -> None:
    for _ in range(2):
        with moeshm.connect(worker.address, transport="shared") as client:
            compute(client, 3)
        assert worker.events() == BOTH_WAYS + AND_BACK
        assert mapped_rings(worker.process.pid) == 0


def test_a_stream_registers_nothing(worker: Worker) -> None:
    with moeshm.connect(worker.address, transport="stream") as client:
        compute(client, 3)
    assert worker.events() == []


def test_the_log_says_how_much(worker: Worker) -> None:
    with moeshm.connect(worker.address, transport="shared"):
        pass
    text = worker.process.log.read_until("session ended after")
    sizes = [int(found) for found in re.findall(rf"INFO {REGISTERED}(\d+)", text)]
    total = f"{sum(sizes) / 2**20:.1f} MiB registered for the device"
    assert f"tokens a call, {total}" in text


def test_a_client_that_is_killed(worker: Worker) -> None:
    with running(["-c", VICTIM, worker.address, "3"]) as victim:
        victim.output.read_until("submitted")
        victim.kill()
    assert worker.events() == BOTH_WAYS + AND_BACK
    assert mapped_rings(worker.process.pid) == 0


def test_a_client_that_is_killed_while_its_call_is_computed(worker: Worker) -> None:
    """What the device uses is not taken from it."""
    with running(["-c", VICTIM, worker.address, str(GATED)]) as victim:
        victim.output.read_until("submitted")
        assert worker.events(COMPUTING) == [*BOTH_WAYS, COMPUTING]
        victim.kill()
    os.write(worker.gate, b"x")
    assert worker.events() == [COMPUTED, *AND_BACK]


def test_other_sessions_keep_theirs(worker: Worker) -> None:
    with moeshm.connect(worker.address, transport="shared") as first:
        compute(first, 3)
        with moeshm.connect(worker.address, transport="shared") as second:
            compute(second, 3)
        assert worker.events() == 2 * BOTH_WAYS + AND_BACK
        compute(first, 3)
    assert worker.events() == AND_BACK


def test_a_hello_that_is_refused_registers_nothing(worker: Worker) -> None:
    with attacking(worker.address) as attacker:
        attacker.control.send(hello(protocol=99))
        assert "protocol" in attacker.last_word()
    assert worker.events("got no session") == []


def test_a_client_that_breaks_the_protocol(worker: Worker) -> None:
    with attacking(worker.address, "shared") as attacker:
        attacker.poke(attacker.calls, PRODUCER_WORD, 1 << 62)
        assert "broke the protocol" in attacker.last_word()
    assert worker.events() == BOTH_WAYS + AND_BACK
    assert mapped_rings(worker.process.pid) == 0


def test_a_call_that_fails(worker: Worker) -> None:
    with moeshm.connect(worker.address, transport="shared") as client:
        with pytest.raises(WorkerFailed, match="cannot be launched"):
            compute(client, FAILING)
        compute(client, 3)
    assert worker.events() == BOTH_WAYS + AND_BACK


def test_a_gpu_that_is_lost(worker: Worker) -> None:
    with (
        moeshm.connect(worker.address, transport="shared") as client,
        pytest.raises(WorkerFailed, match="DeviceLost"),
    ):
        compute(client, FATAL)
    assert worker.events() == BOTH_WAYS + AND_BACK
    assert worker.process.wait() == os.EX_SOFTWARE


def test_a_worker_that_is_told_to_end(worker: Worker) -> None:
    with moeshm.connect(worker.address, transport="shared") as client:
        compute(client, 3)
        worker.process.signal(signal.SIGTERM)
        assert worker.events() == BOTH_WAYS + AND_BACK
    assert worker.process.wait() == 0
