"""A worker that has a client and nothing to do lets the CPU be."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import moeshm
from tests.crash.arithmetic import FREE, make_inputs
from tests.crash.processes import GatedWorker

WINDOW_S = 1.0


def test_an_idle_worker_uses_little_of_a_cpu(
    worker: GatedWorker, client: moeshm.ExpertClient
) -> None:
    client.compute(*make_inputs(FREE))
    before = cpu_s(worker.process.pid)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.process.wait(WINDOW_S)
    assert cpu_s(worker.process.pid) - before < 0.1 * WINDOW_S


def cpu_s(pid: int) -> float:
    """CPU time of a process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
