"""A gated worker and a client of it, over each transport."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import moeshm
from moeshm import settings
from tests.crash.processes import GatedWorker, gated_worker


@pytest.fixture(params=["shared", "stream"])
def transport(request: pytest.FixtureRequest) -> str:
    """How activations travel."""
    return str(request.param)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[GatedWorker]:
    """A worker that is ready."""
    with gated_worker(tmp_path) as started:
        yield started


@pytest.fixture
def client(worker: GatedWorker, transport: str) -> Iterator[moeshm.ExpertClient]:
    """A client of the worker, without a fallback."""
    with moeshm.connect(worker.address, transport=transport) as connected:
        assert connected.transport == transport
        yield connected


@pytest.fixture
def small_rings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rings for one token of the widest layer: two calls of it fill them."""
    monkeypatch.setenv("MOESHM_BATCH_CAPACITY", "1")
    settings.current.cache_clear()
    yield
    settings.current.cache_clear()
