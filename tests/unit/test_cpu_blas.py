"""One thread of NumPy's BLAS while the CPU's backend computes, as several are wrong together."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import pytest

from moeshm.backends.cpu_blas import OneThread, Pool, numpy_pools


class Blas:
    """A library of which only the number of threads is known."""

    def __init__(self, n_threads: int, *, is_by_thread: bool = False) -> None:
        self._n_threads = n_threads
        self._by_thread: dict[int, int] = {}
        self._is_by_thread = is_by_thread
        self.n_changes = 0
        self.pool = Pool(lambda: self.n_threads, self.set, is_by_thread)

    @property
    def n_threads(self) -> int:
        """That a product of the calling thread would have."""
        if self._is_by_thread:
            return self._by_thread.get(threading.get_ident(), self._n_threads)
        return self._n_threads

    def set(self, n_threads: int) -> None:
        """As the library does it."""
        self.n_changes += 1
        if self._is_by_thread:
            self._by_thread[threading.get_ident()] = n_threads
        else:
            self._n_threads = n_threads


def in_another_thread(one_thread: OneThread, leave: threading.Event) -> threading.Thread:
    """It is inside when this returns, and until it may leave."""
    entered = threading.Event()

    def enter() -> None:
        with one_thread:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=enter)
    thread.start()
    entered.wait()
    return thread


def test_each_pool_has_one_thread_and_then_as_many_as_before() -> None:
    all_of_them = Blas(4), Blas(16), Blas(8, is_by_thread=True)
    with OneThread(tuple(blas.pool for blas in all_of_them)):
        assert [blas.n_threads for blas in all_of_them] == [1, 1, 1]
    assert [blas.n_threads for blas in all_of_them] == [4, 16, 8]


def test_a_pool_of_one_thread_is_left_alone() -> None:
    blas = Blas(1)
    with OneThread((blas.pool,)):
        pass
    assert blas.n_changes == 0


def test_who_enters_as_another_leaves_has_one_thread() -> None:
    """It saw one thread, but not how it is by itself."""
    blas = Blas(4)
    looks = 0

    def look() -> int:
        nonlocal looks
        looks += 1
        if looks == 1:
            # Another has set it, and is gone before anything comes of this look.
            other()
            return 1
        return blas.n_threads

    def other() -> None:
        with one_thread:
            pass

    one_thread = OneThread((Pool(look, blas.set, is_by_thread=False),))
    with one_thread:
        assert blas.n_threads == 1
    assert blas.n_threads == 4


def test_who_leaves_last_gives_the_threads_back() -> None:
    blas, leave = Blas(4), threading.Event()
    one_thread = OneThread((blas.pool,))
    with one_thread:
        other = in_another_thread(one_thread, leave)
    assert blas.n_threads == 1
    leave.set()
    other.join()
    assert blas.n_threads == 4


def test_where_each_thread_has_its_own_number_each_sets_and_restores_it() -> None:
    blas, leave = Blas(4, is_by_thread=True), threading.Event()
    one_thread = OneThread((blas.pool,))
    other = in_another_thread(one_thread, leave)
    assert blas.n_threads == 4
    with one_thread:
        assert blas.n_threads == 1
    assert blas.n_threads == 4
    leave.set()
    other.join()
    assert sorted(blas._by_thread.values()) == [4, 4]


def test_an_error_gives_the_threads_back() -> None:
    blas = Blas(4)
    with pytest.raises(KeyboardInterrupt), OneThread((blas.pool,)):
        raise KeyboardInterrupt
    assert blas.n_threads == 4


def test_what_somebody_else_sets_meanwhile_stays() -> None:
    blas = Blas(4)
    with OneThread((blas.pool,)):
        blas.set(3)
    assert blas.n_threads == 3


def test_what_somebody_else_sets_meanwhile_is_not_for_the_next_call() -> None:
    blas, leave = Blas(4), threading.Event()
    one_thread = OneThread((blas.pool,))
    other = in_another_thread(one_thread, leave)
    blas.set(3)
    with one_thread:
        assert blas.n_threads == 1
    leave.set()
    other.join()
    assert blas.n_threads == 3


def test_what_an_interrupt_left_goes_with_the_next_call_of_that_thread() -> None:
    blas = Blas(4)
    one_thread = OneThread((blas.pool,))
    one_thread.__enter__()  # and Ctrl-C before the first line in it
    with one_thread:
        pass
    assert blas.n_threads == 4


def test_a_child_of_fork_has_the_threads_and_no_lock_of_its_parents() -> None:
    blas, leave = Blas(4), threading.Event()
    one_thread = OneThread((blas.pool,))
    other = in_another_thread(one_thread, leave)
    with one_thread._lock:
        one_thread.leave_all()  # what the child does, of which this is the only thread
        n_threads = blas.n_threads
        with one_thread:
            assert blas.n_threads == 1
    leave.set()
    other.join()
    assert n_threads == blas.n_threads == 4


@pytest.mark.skipif(not numpy_pools(), reason="NumPy multiplies with another library")
def test_numpy_multiplies_on_one_thread_while_experts_are_computed() -> None:
    """In a process of its own, as this one has other threads, too; and not in its first thread,
    which is the one that threadpoolctl listens to."""
    program = """
        import threading
        import numpy as np
        from threadpoolctl import threadpool_info, threadpool_limits
        from moeshm.backends.cpu import CpuBackend
        from moeshm.backends import cpu_team
        from tests.checkpoints import random_layer
        from tests.steps import AlwaysDue

        def threads():
            (blas,) = (each for each in threadpool_info() if each["user_api"] == "blas")
            return blas["num_threads"]

        threadpool_limits(3, "blas")
        cpu_team.STEP_MULTIPLY_ADDS = 1
        backend = CpuBackend({0: random_layer(0)}, threads=2)
        x = np.ones((16, backend.layers[0].hidden_size), np.float32)
        ids = np.zeros((16, 1), np.int32)
        weights, out, seen = np.ones((16, 1), np.float32), np.empty_like(x), []
        pauses = AlwaysDue(lambda: seen.append(threads()))
        arguments = (0, x, ids, weights, out, pauses)
        call = threading.Thread(target=backend.ffn_in_steps, args=arguments)
        call.start()
        call.join()
        print(seen[0], threads())
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout == "1 3\n", ran.stderr
