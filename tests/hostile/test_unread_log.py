"""A worker whose log nobody reads: it serves and refuses, and tells later what was lost."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path

import moeshm
from tests.crash.arithmetic import FREE, assert_exact, make_inputs
from tests.crash.processes import NotifySocket, Pipe, running
from tests.hostile.attacker import attacking

#: More than there are threads that refuse clients (moeshm/refusals.py).
_N_REFUSED = 40


def _fill(pipe: int) -> int:
    """With how many bytes."""
    n_filled = 0
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            n_filled += os.write(pipe, b"x" * 4096)
    os.set_blocking(pipe, True)
    return n_filled


def test_a_worker_whose_log_nobody_reads_serves_and_refuses(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 's'}"
    notify = NotifySocket(tmp_path / "n")
    reader, writer = os.pipe()
    environment = {**notify.environment, "MOESHM_MAX_SESSIONS_PER_PROCESS": "1"}
    arguments = ["-m", "tests.hostile.worker", address]
    with (
        contextlib.closing(notify),
        running(arguments, environment=environment, stderr=writer) as process,
    ):
        assert notify.receive(process) == "READY=1"
        log = Pipe(reader)
        log.read_until("listening at")
        n_filled = _fill(writer)
        os.close(writer)
        with moeshm.connect(address) as client:
            for number in range(_N_REFUSED):
                with attacking(address) as attacker:
                    assert "MOESHM_MAX_SESSIONS_PER_PROCESS=1" in attacker.last_word()
                inputs = make_inputs(FREE, number)
                assert_exact(client.compute(*inputs), inputs)
            log.read(n_filled)
            with attacking(address) as attacker:
                attacker.last_word()
            lines = log.read_until("got no session")
        # The first was kept.
        assert "session over" in lines
        # Some may be told of later: who is refused hears of it before the log does.
        assert re.search(r"\b[1-9][0-9]* lines were lost", lines)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert "session ended after" in log.read_rest()
    os.close(reader)
