"""The worker, and a client of it by each transport."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import moeshm
from tests.conformance.views.serving import Worker


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    serving = Worker(tmp_path / "s")
    yield serving
    serving.close()


@pytest.fixture(params=["shared", "stream"])
def transport(request: pytest.FixtureRequest) -> str:
    """How calls travel."""
    return str(request.param)


@pytest.fixture
def client(worker: Worker, transport: str) -> Iterator[moeshm.ExpertClient]:
    with moeshm.connect(worker.address, transport=transport) as connected:
        yield connected
