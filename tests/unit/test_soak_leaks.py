"""What a soak's inspection finds: an fd, a thread, a mapped ring, a segment, a process, memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moeshm import RingProducer
from moeshm.soak import leaks
from moeshm.soak.actors import CallerProcess, Worker
from moeshm.soak.caller import ROLES
from moeshm.soak.director import Soak
from moeshm.soak.inspection import WARM_UP, Inspection
from moeshm.soak.ledger import Ledger

RUN = f"{os.getpid()}-test"


class Some(NamedTuple):
    """A process as an inspection sees it."""

    pid: int
    name: str
    is_kept: bool = True
    role: str = "a role"
    is_used: bool = True


US = Some(os.getpid(), "us")


def look_once(is_done: Callable[[], bool], _limit_s: float) -> bool:
    return is_done()


NOWHERE = Path("/nowhere")


def inspect(workers: Any = (US,), callers: Any = (), run: str = RUN) -> tuple[Inspection, Ledger]:
    """It knows what we hold now."""
    ledger = Ledger()
    inspection = Inspection(ledger, run, look_once, NOWHERE)
    inspection.know_worker(US)  # type: ignore[arg-type]
    inspection.look(workers, callers)
    assert ledger.leaks == []
    return inspection, ledger


@contextlib.contextmanager
def an_fd() -> Iterator[None]:
    reader, writer = os.pipe()
    yield
    os.close(reader)
    os.close(writer)


@contextlib.contextmanager
def a_thread() -> Iterator[None]:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    yield
    over.set()
    thread.join()


@contextlib.contextmanager
def a_ring() -> Iterator[None]:
    with RingProducer.create(None, capacity=1 << 16):
        yield


@pytest.mark.parametrize(
    ("leak", "says"),
    [(an_fd, "2 more fds to pipe"), (a_thread, "1 more threads"), (a_ring, "more mapped rings")],
)
def test_what_a_process_keeps_is_told_once(leak: Any, says: str) -> None:
    inspection, ledger = inspect()
    with leak():
        for _ in range(2):
            inspection.look([US], [])  # type: ignore[list-item]
    (told,) = ledger.leaks
    assert told.startswith("us: ")
    assert says in told


def test_what_is_gone_in_time_is_no_leak() -> None:
    inspection, ledger = inspect()
    with contextlib.ExitStack() as stack:
        stack.enter_context(an_fd())

        def wait(is_done: Callable[[], bool], _limit_s: float) -> bool:
            assert not is_done()
            stack.close()
            return is_done()

        inspection._wait = wait
        inspection.look([US], [])  # type: ignore[list-item]
    assert ledger.leaks == []


def test_a_caller_is_known_by_what_it_held_at_its_first_rest() -> None:
    caller = Some(US.pid, "caller 1")
    ledger = Ledger()
    inspection = Inspection(ledger, RUN, look_once, NOWHERE)
    # Not by what it held while it only started.
    inspection.look([], [caller._replace(is_used=False)])  # type: ignore[list-item]
    with an_fd():
        inspection.look([], [caller])  # type: ignore[list-item]
        assert ledger.leaks == []
        assert inspection.compared == {}
        n_threads = leaks.holding(US.pid).threads
        with a_thread():
            inspection.look([], [caller])  # type: ignore[list-item]
    assert ledger.leaks == [f"caller 1: 1 more threads than {n_threads}"]
    assert inspection.compared == {"a role": 1}


def test_a_kind_that_was_never_compared_is_told(tmp_path: Path) -> None:
    soak = Soak("a model", seconds=120, seed=1)
    soak._workers += [
        Worker(name, name == "kept worker", tmp_path, [], {}) for name in ("kept worker", "worker")
    ]
    soak._callers += [CallerProcess(n, role, n == 0, tmp_path) for n, role in enumerate(ROLES)]
    soak._inspection.compared.update(["kept worker", *ROLES[:-1]])
    soak._look_at_comparisons()
    report = soak._report()
    (told,) = report.failures
    assert f"nothing is known of leaks in {ROLES[-1]!r}" in told
    assert report.compared == {
        "kept worker": 1,
        "worker": 0,
        **dict.fromkeys(ROLES, 1),
        ROLES[-1]: 0,
    }


def test_a_pid_that_is_used_again_is_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    inspection, ledger = inspect()
    monkeypatch.setattr("moeshm.process.start_ticks", lambda _pid: 7)
    with an_fd():
        inspection.look([], [US])  # type: ignore[list-item]
    assert ledger.leaks == []
    assert list(inspection._bases) == [(US.pid, 7)]


def test_without_a_fresh_one_a_worker_is_known_by_its_first_rest() -> None:
    ledger = Ledger()
    inspection = Inspection(ledger, RUN, look_once, NOWHERE)
    inspection.look([US], [])  # type: ignore[list-item]
    with an_fd():
        inspection.look([US], [])  # type: ignore[list-item]
    assert ledger.leaks == ["us: 2 more fds to pipe"]


def test_who_is_gone_while_it_is_looked_at_is_left_out() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE) as child:
        gone = Some(child.pid, "gone")
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        # Nobody but its parent, whom this would be a leak of, cares for a zombie.
        inspection = Inspection(Ledger(), RUN, look_once, NOWHERE)
        inspection.look([], [gone])  # type: ignore[list-item]
        child.wait()
        inspection.look([], [gone, Some(0, "none")])  # type: ignore[list-item]
    assert inspection._bases == {}


def test_a_zombie_is_told() -> None:
    inspection, ledger = inspect()
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        inspection.look([US], [])  # type: ignore[list-item]
    assert ledger.leaks == [f"us: a zombie child, {child.pid}"]


def test_a_workers_folder_that_is_left_where_nobody_was_killed(tmp_path: Path) -> None:
    ledger = Ledger()
    inspection = Inspection(ledger, RUN, look_once, tmp_path)
    for name, is_quiet in (("moeshm-worker-a", False), ("moeshm-worker-b", True)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        with (tmp_path / name / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            inspection.look([], [], is_quiet)
            assert ledger.leaks == []
        inspection.look([], [], is_quiet)
    assert ledger.leaks == ["the folder moeshm-worker-b, and nobody has its lock"]


def test_a_process_of_the_run_that_nobody_knows_is_told_and_ended() -> None:
    run = f"{RUN}-stranger"
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, leaks.RUN_VARIABLE: run},
    ) as stranger:
        assert stranger.stdout is not None
        assert stranger.stdout.read(1)  # it is what it was started as
        inspection, ledger = inspect(callers=[Some(stranger.pid, "caller 1")], run=run)
        inspection.look([US], [])  # type: ignore[list-item]
        assert stranger.wait(30) == -9
    assert len(ledger.leaks) == 1
    assert ledger.leaks[0].startswith(f"process {stranger.pid} (")
    assert "sys.stdin.read()" in ledger.leaks[0]


def test_a_named_segment_is_told_once() -> None:
    inspection, ledger = inspect()
    name = f"/moeshm-soak-test-{os.getpid()}"
    with RingProducer.create(name, capacity=1 << 16):
        for _ in range(2):
            inspection.look_for_segments({})
    assert ledger.leaks == [f"/dev/shm{name}"]


def test_a_segment_that_was_there_or_is_another_processs_is_none_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = f"/moeshm-soak-test-{os.getpid()}"
    with RingProducer.create(name, capacity=1 << 16):
        inspection, ledger = inspect()
        inspection.look_for_segments({})
        assert ledger.leaks == []
        with subprocess.Popen([sys.executable, "-c", ""]) as dead:
            dead.wait()
        for other in (os.getppid(), dead.pid):
            monkeypatch.setattr(leaks, "_creators", lambda _name, pid=other: {pid})
            assert leaks.left_segments((), {US.pid}) == []
        # Of ours, whether it lives or not.
        assert f"/dev/shm{name}" in leaks.left_segments((), {US.pid, dead.pid})


def test_memory_that_grows_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    inspection, ledger = inspect()
    sizes = iter([50 << 20, 70 << 20, 60 << 20, 90 << 20, 134 << 20, 135 << 20, 200 << 20])
    holding = leaks.holding(US.pid)

    def grown(_pid: int) -> leaks.Holding:
        return holding._replace(anonymous_bytes=size)

    monkeypatch.setattr(leaks, "holding", grown)
    inspection._memory.clear()
    for n, size in enumerate(sizes):
        inspection.look([US], [])  # type: ignore[list-item]
        assert bool(inspection.growth_bytes()) == (n >= WARM_UP)
        # 64 MiB more than the most before.
        assert len(ledger.leaks) == (size > 134 << 20)
    assert "MiB more than after its warm-up" in ledger.leaks[0]


def test_a_process_that_is_gone_holds_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert leaks.children_of(child.pid) == []
    with pytest.raises(OSError, match="No such"):
        leaks.holding(child.pid)
