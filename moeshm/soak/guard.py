"""Ends what is left of a soak that was killed: `python -m moeshm.soak.guard RUN FOLDER`.

It reads standard input, whose other end the soak holds, until that is gone; then it kills the
run's processes, also those that stand still, and removes its folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

from ..process import python_module
from . import leaks

#: Processes that were about to start others may be followed by those.
_LIMIT_S, _AGAIN_S = 30.0, 0.05


class Guard:
    """The process, as the soak has it. It is none of the run's, and signals of the terminal do not
    reach it."""

    def __init__(self, run: str, folder: str) -> None:
        self._popen = subprocess.Popen(
            python_module("moeshm.soak.guard", run, folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def close(self) -> None:
        """End the run, and wait until nothing is left."""
        self._popen.communicate()


def end_all(run: str) -> None:
    """Kill all processes of a run but this one, until there are none."""
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        found = leaks.processes_of(run)
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_AGAIN_S)


def main(run: str, folder: str) -> None:
    """Until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end_all(run)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
