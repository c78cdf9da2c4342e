"""Roles, monitors, bells: threads wait for each other, and an interrupt leaves nothing taken."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeshm._role import Bell, Monitor, Role
from moeshm.errors import RingFull
from tests.interrupts import interrupt_often


def test_one_thread_has_it_at_a_time() -> None:
    role = Role()
    assert (role.owner, role.is_taken) == (0, False)
    with role.taken(time.monotonic() + 10):
        assert (role.owner, role.is_taken) == (threading.get_ident(), True)
        # Nor the same once more, as from a signal's handler.
        with role.tried() as is_mine:
            assert not is_mine
        assert role.is_taken
        with pytest.raises(RingFull, match="until this one's deadline"), role.taken(0.001):
            pass
    assert (role.owner, role.is_taken) == (0, False)


def test_it_is_given_back_after_an_error() -> None:
    role = Role()
    with pytest.raises(KeyError), role.tried():
        raise KeyError
    assert not role.is_taken


def test_who_waits_for_it_gets_it() -> None:
    role, waits, got = Role(), threading.Event(), threading.Event()

    def wait() -> None:
        waits.set()
        with role.taken(time.monotonic() + 60):
            got.set()

    thread = threading.Thread(target=wait)
    with role.tried():
        thread.start()
        assert waits.wait(60)
        assert not got.is_set()
    assert got.wait(60)
    thread.join()
    assert not role.is_taken


def test_interrupts_at_any_moment_leave_it_with_nobody() -> None:
    role = Role()

    def go_on() -> None:
        with role.taken(time.monotonic() + 60):
            pass

    def check() -> None:
        assert not role.is_taken

    interrupt_often(300, go_on, check)


def test_a_signal_that_another_thread_gets_ends_a_wait() -> None:
    """The system may give it to any."""
    role, monitor = Role(), Monitor()

    def wait_for_role() -> None:
        with role.taken(time.monotonic() + 60):
            raise AssertionError

    def wait_for_news() -> None:
        with monitor:
            monitor.wait(60)

    with role.tried():
        for wait in (wait_for_role, wait_for_news, lambda: Bell().wait(60)):
            start = time.monotonic()
            with pytest.raises(KeyboardInterrupt), interrupted_elsewhere():
                wait()
            assert time.monotonic() - start < 30, "it waited for its own deadline"
    with monitor, role.tried() as is_mine:
        assert is_mine


@contextlib.contextmanager
def interrupted_elsewhere() -> Iterator[None]:
    """SIGINT to another thread, while this one sleeps."""
    main = threading.get_native_id()

    def interrupt() -> None:
        stat = Path(f"/proc/self/task/{main}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.001)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_who_waits_for_news_is_told() -> None:
    monitor = Monitor()
    told: list[bool] = []

    def wait() -> None:
        with monitor:
            waiting.release()
            told.append(monitor.wait(60))

    waiting = threading.Semaphore(0)
    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert waiting.acquire(timeout=60)
    with monitor:  # all of them gave it away, so they wait
        assert not told
        monitor.notify_all()
    for thread in threads:
        thread.join()
    with monitor:
        assert told == [True] * 3
        assert not monitor.wait(0.001)


def test_interrupts_at_any_moment_leave_a_monitor_whole() -> None:
    """Nobody gives back a lock that it has not got, and nothing but the interrupt comes out."""
    monitor, inside, is_over = Monitor(), [], threading.Event()
    n_both = 0

    def use(me: str) -> None:
        nonlocal n_both
        inside.append(me)
        n_both += len(inside) > 1
        inside.remove(me)

    def tell() -> None:
        while not is_over.is_set():
            with monitor:
                use("other")
                monitor.notify_all()

    def go_on() -> None:
        with monitor:
            monitor.wait(60)

    def use_it() -> None:
        with monitor:
            use("main")

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        interrupt_often(300, go_on, use_it)
    finally:
        is_over.set()
        thread.join()
    assert n_both == 0


def test_a_bell_that_rang_before_is_heard_once() -> None:
    bell = Bell()
    bell.ring()
    bell.ring()
    assert bell.wait(60)
    assert not bell.wait(0.001)
    thread = threading.Thread(target=bell.ring)
    thread.start()
    assert bell.wait(60)
    thread.join()
