"""What holds for every test: nothing may remain of it, and a GPU is used only where one is."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import gpus, leaks

# Before anything imports NumPy, here and in the thousand processes that tests start: each of them
# would have OpenBLAS's idle threads spin for a while, as they do before they sleep.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")


def pytest_collection_finish() -> None:
    # A test module may be collected on any machine, and for runs that use no GPU.
    if "cupy" in sys.modules:
        raise pytest.UsageError("a test module imports CuPy at its top; import it in the tests")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := gpus.why_none()):
        pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def _the_run_leaves_nothing() -> Iterator[None]:
    """What tests' own fixtures share is seen here, and processes whose parents were killed."""
    os.environ[leaks.RUN_VARIABLE] = f"{os.getpid()}-{os.urandom(8).hex()}"
    before = leaks.take_snapshot()
    yield
    left = leaks.find_leaks(before, fds=False) + leaks.find_orphans()
    del os.environ[leaks.RUN_VARIABLE]
    assert not left, "the tests left behind: " + "; ".join(left)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For sockets in folders of their own: tmp_path has the test's name, and of a socket's path
    only 107 bytes are allowed."""
    with tempfile.TemporaryDirectory(prefix="s") as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def _a_test_leaves_nothing(
    request: pytest.FixtureRequest, _the_run_leaves_nothing: None
) -> Iterator[None]:
    before = leaks.take_snapshot()
    yield
    # A GPU driver opens fds when it is first used, and keeps them.
    left = leaks.find_leaks(before, fds=request.node.get_closest_marker("gpu") is None)
    assert not left, "this test left behind: " + "; ".join(left)
