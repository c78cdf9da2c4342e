"""The guard of `tests/conftest.py` sees each kind of thing that a test may leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests import leaks

# Ends at once; its own child stays, and holds our pipes.
MIDDLE = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]])"
# Says its own pid, then stays until its standard input ends.
WAIT = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"


@contextlib.contextmanager
def start_orphan(environment: Mapping[str, str] | None) -> Iterator[int]:
    """The pid of a process whose parent has ended; it ends with the block, if not before."""
    with subprocess.Popen(
        [sys.executable, "-c", MIDDLE, WAIT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as parent:
        assert parent.stdout is not None
        orphan = int(parent.stdout.readline())
        parent.wait()
        yield orphan


def test_a_test_that_leaves_nothing_is_not_blamed() -> None:
    before = leaks.take_snapshot()
    with open(os.devnull, "rb"):
        pass
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert leaks.find_leaks(before) == []


def test_an_open_fd_is_named_by_what_it_points_to(tmp_path: Path) -> None:
    before = leaks.take_snapshot()
    with open(tmp_path / "left open", "wb") as file:
        (leak,) = leaks.find_leaks(before)
        assert leak == f"1 more fd to {tmp_path}/left open, one of [{file.fileno()}]"
        assert leaks.find_leaks(before, fds=False) == []


def test_a_second_fd_to_the_same_file_is_seen() -> None:
    reader, writer = os.pipe()
    before = leaks.take_snapshot()
    copy = os.dup(reader)
    (leak,) = leaks.find_leaks(before)
    assert leak.startswith("1 more fd to pipe:[")
    for fd in (reader, writer, copy):
        os.close(fd)


def test_what_only_a_reference_cycle_holds_is_collected(tmp_path: Path) -> None:
    class Holder:
        def __init__(self) -> None:
            self.fd = os.open(tmp_path, os.O_RDONLY)
            self.itself = self

        def __del__(self) -> None:
            os.close(self.fd)

    before = leaks.take_snapshot()
    Holder()
    assert leaks.find_leaks(before) == []


def test_a_running_child_is_named_and_killed() -> None:
    before = leaks.take_snapshot()
    with subprocess.Popen(
        [sys.executable, "-c", WAIT], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as child:
        (leak,) = leaks.find_leaks(before, fds=False)
        assert leak.startswith(f"child process {child.pid} (running ")
        assert "sys.stdin.read()" in leak
    assert leaks.find_leaks(before) == []


def test_a_zombie_is_called_one() -> None:
    before = leaks.take_snapshot()
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert leaks.find_leaks(before) == [f"child process {pid} (a zombie that nobody waited for)"]
    assert leaks.find_leaks(before) == []


def test_a_segment_is_named_by_its_path() -> None:
    before = leaks.take_snapshot()
    segment = Path(f"/dev/shm/moeshm-test-leaks-{os.getpid()}-1")
    segment.touch()
    try:
        assert leaks.find_leaks(before) == [str(segment)]
    finally:
        segment.unlink()


@pytest.mark.parametrize("signed", [False, True], ids=["in its name", "in its control page"])
def test_a_segment_of_a_living_stranger_is_not_ours(signed: bool) -> None:
    before = leaks.take_snapshot()
    with start_orphan(environment={}) as stranger:
        segment = Path("/dev/shm/moeshm-test-leaks-" + ("signed" if signed else str(stranger)))
        segment.write_bytes(bytes(64) + struct.pack("<Q", stranger) if signed else b"")
        try:
            assert leaks.find_leaks(before, fds=False) == []
        finally:
            segment.unlink()


def test_an_orphan_is_named_with_its_test_and_killed() -> None:
    with start_orphan(environment=None) as orphan:
        (leak,) = leaks.find_orphans(limit_s=0)
    assert leak.startswith(f"process {orphan} (running ")
    assert leak.endswith(
        "started by tests/unit/test_leaks.py::"
        "test_an_orphan_is_named_with_its_test_and_killed (call)"
    )


def test_an_orphan_has_time_to_end() -> None:
    with start_orphan(environment=None) as orphan:
        os.kill(orphan, signal.SIGTERM)
        assert leaks.find_orphans() == []
