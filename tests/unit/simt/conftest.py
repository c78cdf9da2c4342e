"""The kernels of probes.cu, by the size of a warp."""

from __future__ import annotations

import pytest

from tests.simt import Module
from tests.unit.simt.probing import probe_module


@pytest.fixture(params=[32, 64], ids="WARP={}".format)
def warp(request: pytest.FixtureRequest) -> int:
    lanes: int = request.param
    return lanes


@pytest.fixture
def probes(warp: int) -> Module:
    return probe_module(warp)


@pytest.fixture
def probes_32() -> Module:
    return probe_module(32)
