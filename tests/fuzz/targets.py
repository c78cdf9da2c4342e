"""The targets by name, and one execution of one."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

#: In one process; the coverage-guided engine drives them, and so does the seeded one.
NAMES = ("ring", "records", "handshakes", "streams", "slabs", "files")
#: With other processes, which are under attack; only the seeded engine drives them.
LIVE_NAMES = ("live", "lying")
#: Not a target of anything, but of the tests of the fuzzer.
ALL = (*NAMES, *LIVE_NAMES, "broken")


class Target(Protocol):
    """A module of this package that is a target."""

    def test_one(self, data: bytes) -> str:
        """Run one execution; what became of it, in words of which there are few."""
        ...

    def seeds(self) -> list[bytes]:
        """Data to begin with."""
        ...

    def close(self) -> None:
        """Let go of what is kept between executions; the next one makes it anew."""
        ...


def load(name: str) -> Target:
    """Import a target."""
    return cast(Target, importlib.import_module(f"tests.fuzz.{name}"))
