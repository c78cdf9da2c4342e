"""Whom a fault hits, what it explains, and that everything that stands still goes on again."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moeshm.soak.hostile import ATTACKS
from moeshm.soak.injector import Injector
from moeshm.soak.ledger import Ledger
from moeshm.soak.messages import Failed
from moeshm.soak.schedule import WEIGHTS, Fault


class FakeProcess:
    """Notes the signals that it gets."""

    def __init__(self, name: str, is_kept: bool = False) -> None:
        self.name = name
        self.path = Path("/nowhere")
        self.pid = 0
        self.own = f"own worker of {name}"
        self.is_kept = is_kept
        self.is_ready = self.is_calling = True
        self.is_stopped = self.is_resting = False
        self.why_gone = ""
        self.heard = 0.0
        self.cause: Any = None
        self.signals: list[signal.Signals] = []

    def signal(self, number: signal.Signals, why_gone: str = "") -> None:
        self.signals.append(number)
        self.why_gone = why_gone or self.why_gone
        if number in (signal.SIGSTOP, signal.SIGCONT):
            self.is_stopped = number == signal.SIGSTOP

    def own_workers(self) -> list[int]:
        return []


@pytest.fixture
def workers() -> list[FakeProcess]:
    return [FakeProcess("kept worker"), FakeProcess("worker")]


@pytest.fixture
def callers() -> list[FakeProcess]:
    return [FakeProcess("caller 0", is_kept=True), FakeProcess("caller 1")]


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def injector(
    ledger: Ledger, workers: list[FakeProcess], callers: list[FakeProcess]
) -> Iterator[Injector]:
    injector = Injector(ledger, workers, callers)  # type: ignore[arg-type]
    yield injector
    injector.end_all()


def inject(injector: Injector, kind: str, draw: float = 0.0, for_s: float = math.inf) -> None:
    assert kind in WEIGHTS
    injector.inject(Fault(0.0, kind, draw, for_s))


def is_explained(ledger: Ledger, worker: str, since: float) -> bool:
    before = ledger.unexpected
    ledger.told("c", Failed("WorkerDied", "a call", "line", (worker,), since, since + 1e-3))
    ledger.settle(is_end=True)
    return ledger.unexpected == before


@pytest.mark.parametrize(
    ("kind", "number"),
    [("worker killed", signal.SIGKILL), ("worker ended by SIGTERM", signal.SIGTERM)],
)
@pytest.mark.parametrize("draw", [0.0, 0.999])
def test_the_kept_worker_is_never_ended(
    injector: Injector,
    ledger: Ledger,
    workers: list[FakeProcess],
    kind: str,
    number: signal.Signals,
    draw: float,
) -> None:
    inject(injector, kind, draw)
    assert [worker.signals for worker in workers] == [[], [number]]
    # It is down until it is ready again, and its errors are explained so long.
    assert workers[1].why_gone == number.name
    assert is_explained(ledger, "worker", 1e12)
    assert not is_explained(ledger, "kept worker", 1e12)
    workers[1].cause.end = 1e11
    assert not is_explained(ledger, "worker", 1e12)
    # And nothing is done to it meanwhile.
    inject(injector, kind, draw)
    assert ledger.faults == {kind: 1}


@pytest.mark.parametrize(
    ("kind", "last"),
    [("worker stopped", signal.SIGCONT), ("worker stopped and killed", signal.SIGKILL)],
)
def test_what_was_stopped_does_not_stay_so(
    injector: Injector, workers: list[FakeProcess], kind: str, last: signal.Signals
) -> None:
    inject(injector, kind, draw=0.999)
    injector.step()
    assert workers[1].signals == [signal.SIGSTOP]
    injector.end_all()
    assert workers[1].signals == [signal.SIGSTOP, last]


def test_a_stop_ends_when_its_time_is_over(
    injector: Injector, ledger: Ledger, workers: list[FakeProcess]
) -> None:
    inject(injector, "worker stopped", for_s=-1.0)
    injector.step()
    assert workers[0].signals == [signal.SIGSTOP, signal.SIGCONT]
    assert not is_explained(ledger, "kept worker", 1e12)


def test_who_stands_still_is_not_stopped_again(
    injector: Injector, ledger: Ledger, workers: list[FakeProcess], callers: list[FakeProcess]
) -> None:
    for _ in range(5):
        inject(injector, "worker stopped")
        inject(injector, "caller stopped")
    for process in (*workers, *callers):
        assert process.signals == [signal.SIGSTOP], process.name
    assert ledger.n_faults == 4


def test_the_kept_caller_is_never_killed(
    injector: Injector, ledger: Ledger, callers: list[FakeProcess]
) -> None:
    for draw in (0.0, 0.5, 0.999):
        inject(injector, "caller killed", draw)
    assert [caller.signals for caller in callers] == [[], [signal.SIGKILL]]
    assert ledger.n_faults == 1


def test_who_rests_is_left_alone(
    injector: Injector, ledger: Ledger, callers: list[FakeProcess]
) -> None:
    for caller in callers:
        caller.is_resting = True
    for kind in ("caller killed", "caller stopped", "own worker killed", "own worker stopped"):
        inject(injector, kind)
    assert ledger.n_faults == 0


def test_a_caller_that_only_starts_is_left_alone(
    injector: Injector, ledger: Ledger, callers: list[FakeProcess]
) -> None:
    for caller in callers:
        caller.is_calling = False
    for kind in ("caller killed", "caller stopped"):
        inject(injector, kind)
    assert ledger.n_faults == 0


def test_in_some_rounds_no_caller_is_killed(
    injector: Injector, ledger: Ledger, callers: list[FakeProcess]
) -> None:
    injector.spares_callers = True
    inject(injector, "caller killed")
    assert ledger.n_faults == 0
    inject(injector, "caller stopped")
    assert callers[0].signals == [signal.SIGSTOP]


def test_a_callers_worker_that_stands_still_is_not_hit_again(
    injector: Injector, ledger: Ledger, callers: list[FakeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import time; print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as worker:
        callers[0].pid = os.getpid()
        monkeypatch.setattr(callers[0], "own_workers", lambda: [worker.pid])
        for kind in ("own worker stopped", "own worker killed", "own worker stopped"):
            inject(injector, kind)
        assert ledger.faults == {"own worker stopped": 1}
        injector.end_all()
        inject(injector, "own worker killed")
        assert worker.wait(30) == -signal.SIGKILL
    assert ledger.n_faults == 2


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_counts_once_all_was_sent(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        with contextlib.closing(Connection(listener, path)) as connection:
            made = []
            with contextlib.suppress(TimeoutError):
                for _ in ATTACKS[name](connection, random.Random(1)):
                    made.append(name)
    # Only that one waits for an answer before it has sent all.
    assert made == ([] if name == "broken records" else [name])


class Connection(socket.socket):
    """One whose other end says nothing and leaves."""

    def __init__(self, listener: socket.socket, path: str) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connect(path)
        self._other, _ = listener.accept()

    def recv(self, *_arguments: Any) -> bytes:
        raise TimeoutError

    def recvmsg(self, *_arguments: Any) -> Any:
        return b"", [], 0, None

    def close(self) -> None:
        self._other.close()
        super().close()


def test_an_attack_on_nobody_is_no_fault(injector: Injector, ledger: Ledger) -> None:
    for kind in WEIGHTS:
        if kind.startswith("hostile"):
            inject(injector, kind)
    injector.end_all()
    injector.step()
    assert ledger.n_faults == 0
