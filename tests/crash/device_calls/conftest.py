"""Workers that serve slabs in each way, and clients that have a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import moeshm
from moeshm import engine_device
from tests.crash.device_calls.calls import KINDS, Kind, connected
from tests.crash.processes import GatedWorker, gated_worker
from tests.engine_gpu import Movers, Stream


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each way."""
    return KINDS[request.param]


@pytest.fixture(scope="module")
def lasting_worker(tmp_path_factory: pytest.TempPathFactory, kind: Kind) -> Iterator[GatedWorker]:
    """For tests that leave it as it was; its events are read by nobody."""
    with gated_worker(tmp_path_factory.mktemp("lasting"), has_gpu=kind.has_gpu) as started:
        yield started


@pytest.fixture
def worker(tmp_path: Path, kind: Kind) -> Iterator[GatedWorker]:
    """For tests that end, stop or gate it."""
    with gated_worker(tmp_path, has_gpu=kind.has_gpu) as started:
        yield started


@pytest.fixture
def movers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Movers:
    """What is opened; by default, without a kind, for launches of two."""
    made = Movers()
    if "kind" in request.fixturenames:
        made.most_exchanged = request.getfixturevalue("kind").most_exchanged
    monkeypatch.setattr(engine_device, "open_mover", made.open)
    return made


@pytest.fixture
def stream() -> Iterator[Stream]:
    """One that must have passed everything at the end."""
    made = Stream()
    yield made
    made.close()


@pytest.fixture
def client(
    request: pytest.FixtureRequest, lasting_worker: GatedWorker, movers: Movers, kind: Kind
) -> Iterator[moeshm.ExpertClient]:
    """Of the test's own worker, or of the lasting one; without a fallback."""
    assert not movers.opened
    has_own = "worker" in request.fixturenames
    own: GatedWorker = request.getfixturevalue("worker") if has_own else lasting_worker
    with connected(own, kind) as made:
        yield made
