"""A stage in a process of its own, as those who shoot see it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator

import msgspec

from tests.crash.matrix.shots import Hit, Shot
from tests.crash.processes import Process, running

#: Longer than whatever hangs in a shot, which has its own patience with it.
_PATIENCE_S = 120.0


class Staged:
    """What can be shot at."""

    def __init__(self, process: Process) -> None:
        self._process = process
        process.output.patience_s = _PATIENCE_S
        #: How often a round reaches each point, by name.
        self.counts: dict[str, int] = json.loads(self._read())

    def shoot(self, shot: Shot) -> Hit:
        """Let it happen."""
        self._process.say(msgspec.json.encode(shot).decode())
        return msgspec.json.decode(self._read(), type=Hit)

    def end(self) -> list[str]:
        """What all of them left, a sentence each."""
        self._process.say()
        left: list[str] = json.loads(self._read())
        return left

    def _read(self) -> str:
        try:
            return self._process.output.read_until("\n")
        except EOFError:
            raise AssertionError("the stage broke; its standard error says why") from None


@contextlib.contextmanager
def staged(side: str, transport: str) -> Iterator[Staged]:
    """Start one; what it and its processes write to standard error goes to this one's."""
    arguments = ["-m", "tests.crash.matrix.stage", side, transport]
    # A thread of its own in every process would only get in the way.
    environment = {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    with running(arguments, environment=environment, stderr=2) as process:
        yield Staged(process)
