"""A GPU that a worker cannot use any more: the calls hear of it, and a supervisor restarts it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import moeshm
from moeshm.demo import tiny_moe_path
from moeshm.errors import ConnectError, WorkerDied, WorkerFailed
from tests.crash.lost_gpu_worker import FAILING, FATAL, LAST
from tests.crash.processes import NotifySocket, Process, running

HIDDEN_SIZE, TOP_K = 128, 4


@pytest.fixture
def notify(tmp_path: Path) -> Iterator[NotifySocket]:
    """Where the worker says that it is ready."""
    opened = NotifySocket(tmp_path / "notify")
    yield opened
    opened.close()


@pytest.fixture
def worker(tmp_path: Path, notify: NotifySocket) -> Iterator[Process]:
    """It warms up with calls that neither fail nor are fatal."""
    experts = tmp_path / "experts.json"
    experts.write_text('{"1": "0-7"}')
    command = ["-m", "tests.crash.lost_gpu_worker", "--model", str(tiny_moe_path())]
    command += ["--experts", str(experts)]
    command += ["--device", "cuda:0", "--listen", f"unix:{tmp_path / 'w.sock'}"]
    with running(command, environment=notify.environment) as process:
        assert notify.receive(process) == "READY=1"
        yield process


def compute(client: moeshm.ExpertClient, n_tokens: int) -> None:
    client.compute(
        1,
        np.zeros((n_tokens, HIDDEN_SIZE), np.float32),
        np.zeros((n_tokens, TOP_K), np.int32),
        np.ones((n_tokens, TOP_K), np.float32),
    )


def test_another_error_is_that_calls_own(worker: Process, tmp_path: Path) -> None:
    with moeshm.connect(f"unix:{tmp_path / 'w.sock'}") as client:
        compute(client, 1)
        for _ in range(2):
            with pytest.raises(WorkerFailed, match=r"DeviceError: cuda:0.* cannot be launched"):
                compute(client, FAILING)
        compute(client, 1)
    assert worker.is_running()


def test_a_lost_gpu_ends_the_worker(worker: Process, tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'w.sock'}"
    with moeshm.connect(address) as client, moeshm.connect(address) as idle:
        compute(idle, 2)
        with pytest.raises(WorkerFailed, match=r"DeviceLost: cuda:0 \(a card\) is lost: illegal"):
            compute(client, FATAL)
        assert worker.wait() == os.EX_SOFTWARE == 70
        with pytest.raises((WorkerDied, ConnectError)):
            compute(idle, 2)
    log = worker.log.read_rest()
    assert "CRITICAL cuda:0 (a card) is lost: illegal address; start it anew" in log
    assert not (tmp_path / "w.sock").exists()


def test_a_gpu_that_is_lost_when_experts_come_ends_the_worker(
    worker: Process, tmp_path: Path
) -> None:
    with moeshm.connect(f"unix:{tmp_path / 'w.sock'}") as client:
        compute(client, LAST)
        with pytest.raises(WorkerFailed, match=r"DeviceLost: cuda:0 \(a card\) is lost: illegal"):
            client.hold({1: [8, 9]})
        assert worker.wait() == os.EX_SOFTWARE
    assert "CRITICAL cuda:0 (a card) is lost" in worker.log.read_rest()
