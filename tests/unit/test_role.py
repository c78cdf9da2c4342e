"""A role: one thread has it, and an interrupt leaves it with nobody."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from moeshm._role import Role
from moeshm.errors import RingFull


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
    role, n_interrupts = Role(), 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        while n_interrupts < 300:
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-4)
                while True:
                    with role.taken(time.monotonic() + 60):
                        pass
            except KeyboardInterrupt:
                n_interrupts += 1
            assert not role.is_taken
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
