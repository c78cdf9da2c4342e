"""Whom a fault hits, what it explains, and that everything that stands still goes on again."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
        self.is_ready = True
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
    injector.close()


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


def test_an_attack_on_nobody_is_no_fault(injector: Injector, ledger: Ledger) -> None:
    for kind in WEIGHTS:
        if kind.startswith("hostile"):
            inject(injector, kind)
    injector.end_all()
    injector.step()
    assert ledger.n_faults == 0
