"""A worker in a process of its own, and the CPUs that the two sides are pinned to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import moeshm
from moeshm.errors import ConnectError
from moeshm.process import python_module

from .harness import NO_VARIABLES

_START_LIMIT_S = 60.0


@contextlib.contextmanager
def worker_process(
    module: str, *words: str, variables: Mapping[str, str] = NO_VARIABLES
) -> Iterator[tuple[int, str]]:
    """A module of this package that serves `unix:PATH`, its first argument; the others are `words`,
    and `variables` are added to its environment.

    The pid and the address of a fresh process that answers; SIGTERM ends it. ConnectError: it
    ended before it answered.
    """
    with tempfile.TemporaryDirectory(prefix="moeshm-bench-") as folder:
        address = f"unix:{Path(folder, 'worker.sock')}"
        command = python_module(f"{__package__}.{module}", address, *words)
        environment = {**os.environ, **variables}
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment) as worker:
            try:
                _wait_until_it_answers(worker, address)
                yield worker.pid, address
            finally:
                worker.send_signal(signal.SIGTERM)
                try:
                    worker.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    worker.kill()


def _wait_until_it_answers(worker: subprocess.Popen[bytes], address: str) -> None:
    give_up = time.monotonic() + _START_LIMIT_S
    while True:
        try:
            moeshm.connect(address, transport="stream", timeout_s=_START_LIMIT_S).close()
            return
        except ConnectError:
            if worker.poll() is not None or time.monotonic() > give_up:
                raise
            time.sleep(0.02)


def pin(pid: int, cpu: int) -> None:
    """Let every thread of a process run on one CPU only; threads started later inherit it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), {cpu})
