"""A worker under attack, and a client that must notice nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import moeshm
from tests.crash.arithmetic import FREE, assert_exact, make_inputs
from tests.crash.processes import Process, running


class Victim:
    """A worker process."""

    def __init__(self, process: Process, address: str) -> None:
        self.process = process
        self.address = address

    def expect_log(self, text: str) -> str:
        """Read its log until a line holds the text; no exception may have escaped so far."""
        lines = self.process.log.read_until(text)
        assert "Traceback" not in lines, lines
        return lines

    def expect_ends(self, count: int) -> None:
        """Read its log until so many connections have ended, in whatever way."""
        while count:
            line = self.expect_log("process ")
            count -= "got no session" in line or "session ended after" in line


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """One for all the attacks of a module: it outlives them all."""
    folder: Path = tmp_path_factory.mktemp("hostile")
    address = f"unix:{folder / 's'}"
    with running(["-m", "tests.hostile.worker", address]) as process:
        process.log.read_until("listening at")
        yield Victim(process, address)
        assert process.is_running()


@pytest.fixture(params=["shared", "stream"])
def transport(request: pytest.FixtureRequest) -> str:
    """How the attacker and the bystander talk to the worker."""
    return str(request.param)


@pytest.fixture
def bystander(victim: Victim, transport: str) -> Iterator[moeshm.ExpertClient]:
    """A client whose calls are exact before and after the attack, in one session."""
    with moeshm.connect(victim.address, transport=transport) as client:
        for tag in range(2):
            inputs = make_inputs(FREE, tag)
            assert_exact(client.compute(*inputs), inputs)
        yield client
        for tag in range(2, 5):
            inputs = make_inputs(FREE, tag)
            assert_exact(client.compute(*inputs), inputs)
        assert client.stats().reconnects == 0
        with moeshm.connect(victim.address, transport=transport) as newcomer:
            for tag in range(7):
                inputs = make_inputs(FREE, tag)
                assert_exact(newcomer.compute(*inputs), inputs)
        victim.expect_log("session ended after 7 calls")
    victim.expect_log("session ended after 5 calls")
    assert victim.process.is_running()
