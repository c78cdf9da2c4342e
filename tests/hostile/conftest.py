"""Workers under attack, and clients that must notice nothing of it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import moeshm
from moeshm.demo import tiny_moe_path
from tests.crash.arithmetic import FREE, assert_exact, make_inputs
from tests.crash.processes import PATIENCE_S, Process, mapped_rings, open_fds, running
from tests.hostile.attacker import kernel_refuses_fds

#: What a worker's memory may grow by: the allocator keeps what threads had.
MOST_GROWTH_BYTES = 64 << 20


class Resources(NamedTuple):
    """What a worker process holds."""

    fds: list[str]
    n_threads: int
    n_rings: int


class Victim:
    """A worker process."""

    def __init__(self, process: Process, address: str, refuses_fds: bool = False) -> None:
        self.process = process
        self.address = address
        self.refuses_fds = refuses_fds

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

    def resources(self) -> Resources:
        """What it holds now."""
        pid = self.process.pid
        n_threads = len(os.listdir(f"/proc/{pid}/task"))
        return Resources(open_fds(pid), n_threads, mapped_rings(pid))

    def resident_bytes(self) -> int:
        """Of its memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def expect_resources(self, expected: Resources) -> None:
        """Wait until it holds just that: threads end a moment after the log says so. Or one fewer:
        one that was about to end may have been counted as expected."""
        limit = time.monotonic() + PATIENCE_S
        fewer = expected._replace(n_threads=expected.n_threads - 1)
        while (found := self.resources()) not in (expected, fewer):
            assert time.monotonic() < limit, f"the worker holds {found}, and held {expected}"
            os.sched_yield()


@contextlib.contextmanager
def _victim(folder: Path, arguments: Sequence[str]) -> Iterator[Victim]:
    address = f"unix:{folder / 's'}"
    filled = [argument.format(address=address) for argument in arguments]
    with running(["-m", *filled]) as process:
        process.log.read_until("listening at")
        yield Victim(process, address, "refusing" in arguments and kernel_refuses_fds())
        assert process.is_running()


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """One for all the attacks of a module: it outlives them all."""
    arguments = ["tests.hostile.worker", "{address}", "talkative"]
    with _victim(tmp_path_factory.mktemp("h"), arguments) as started:
        yield started


@pytest.fixture(scope="module")
def hasty_victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """One that loses its patience within a second."""
    arguments = ["tests.hostile.worker", "{address}", "hasty", "talkative"]
    with _victim(tmp_path_factory.mktemp("h"), arguments) as started:
        yield started


@pytest.fixture(scope="module")
def refusing_victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """One that lets no fds through, as all do but those of these tests."""
    arguments = ["tests.hostile.worker", "{address}", "refusing", "talkative"]
    with _victim(tmp_path_factory.mktemp("h"), arguments) as started:
        yield started


@pytest.fixture(scope="module")
def model_victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """`moeshm worker` with the bundled model."""
    model = str(tiny_moe_path())
    arguments = ["moeshm", "worker", "--model", model, "--listen", "{address}", "--threads", "2"]
    with _victim(tmp_path_factory.mktemp("h"), arguments) as started:
        yield started


@pytest.fixture(scope="module")
def victims(
    victim: Victim, hasty_victim: Victim, refusing_victim: Victim, model_victim: Victim
) -> Mapping[str, Victim]:
    """All of them, by name; started before any test, which are not to leave processes."""
    return {
        "victim": victim,
        "hasty_victim": hasty_victim,
        "refusing_victim": refusing_victim,
        "model_victim": model_victim,
    }


@contextlib.contextmanager
def unhurt(victim: Victim, transport: str) -> Iterator[None]:
    """A client's calls are exact before and after the attack, in one session, and so are those of
    one that comes after it; and the worker holds then what it held before."""
    with moeshm.connect(victim.address, transport=transport) as bystander:
        served = _prober(bystander)
        for tag in range(2):
            served(bystander, tag)
        before, bytes_before = victim.resources(), victim.resident_bytes()
        yield
        victim.expect_resources(before)
        assert victim.resident_bytes() - bytes_before < MOST_GROWTH_BYTES
        for tag in range(2, 5):
            served(bystander, tag)
        assert bystander.stats().reconnects == 0
        with moeshm.connect(victim.address, transport=transport) as newcomer:
            for tag in range(7):
                served(newcomer, tag)
        victim.expect_log("session ended after 7 calls")
    victim.expect_log("session ended after ")
    assert victim.process.is_running()


def _prober(client: moeshm.ExpertClient) -> Callable[[moeshm.ExpertClient, int], None]:
    """Makes a client's call and checks its result: against what the arithmetic says, or, of a
    model, against what it was before anything happened."""
    if client.layers[FREE].hidden_size == make_inputs(FREE).hidden_states.shape[1]:

        def probe(client: moeshm.ExpertClient, tag: int) -> None:
            inputs = make_inputs(FREE, tag)
            assert_exact(client.compute(*inputs), inputs)

        return probe
    info = client.layers[FREE]
    rng = np.random.default_rng(7)
    hidden = rng.standard_normal((5, info.hidden_size), np.float32)
    ids = rng.integers(0, info.num_experts, (5, info.top_k), np.int32)
    weights = rng.random((5, info.top_k), np.float32)
    expected = client.compute(FREE, hidden, ids, weights)

    def probe_model(client: moeshm.ExpertClient, _: int) -> None:
        np.testing.assert_array_equal(client.compute(FREE, hidden, ids, weights), expected)

    return probe_model


@pytest.fixture(params=["shared", "stream"])
def transport(request: pytest.FixtureRequest) -> str:
    """How the attacker and the bystander talk to the worker."""
    return str(request.param)


@pytest.fixture
def bystander(victim: Victim, transport: str) -> Iterator[None]:
    """A client that notices nothing."""
    with unhurt(victim, transport):
        yield
