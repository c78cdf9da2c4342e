"""A made-up GPU of the engine's, a worker that has one, too, and nothing that is measured first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moeshm import engine_device
from moeshm.offload import calibration
from tests.crash.processes import GatedWorker, gated_worker
from tests.engine_gpu import Movers, Stream

from ..host_lanes import HostLanes


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostLanes]:
    """Of the engine's GPU."""
    made = HostLanes()
    made.install(monkeypatch)
    yield made
    made.close()


@pytest.fixture
def movers(monkeypatch: pytest.MonkeyPatch) -> Movers:
    """What is opened."""
    made = Movers()
    monkeypatch.setattr(engine_device, "open_mover", made.open)
    return made


@pytest.fixture
def stream() -> Iterator[Stream]:
    """The caller's."""
    made = Stream()
    yield made
    made.close()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[GatedWorker]:
    """With a made-up GPU."""
    with gated_worker(tmp_path, has_gpu=True) as started:
        yield started


@pytest.fixture
def _uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent but what a test sends."""
    monkeypatch.setattr(calibration, "BUDGET_NS", 0)
