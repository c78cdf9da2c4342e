"""Guards around every test and around the whole run: nothing may remain of them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from . import leaks


@pytest.fixture(scope="session", autouse=True)
def _the_run_leaves_nothing() -> Iterator[None]:
    """What tests' own fixtures share is seen here, and processes whose parents were killed."""
    os.environ[leaks.RUN_VARIABLE] = f"{os.getpid()}-{os.urandom(8).hex()}"
    before = leaks.take_snapshot()
    yield
    left = leaks.find_leaks(before, fds=False) + leaks.find_orphans()
    del os.environ[leaks.RUN_VARIABLE]
    assert not left, "the tests left behind: " + "; ".join(left)


@pytest.fixture(autouse=True)
def _a_test_leaves_nothing(
    request: pytest.FixtureRequest, _the_run_leaves_nothing: None
) -> Iterator[None]:
    before = leaks.take_snapshot()
    yield
    # A GPU driver opens fds when it is first used, and keeps them.
    left = leaks.find_leaks(before, fds=request.node.get_closest_marker("gpu") is None)
    assert not left, "this test left behind: " + "; ".join(left)
