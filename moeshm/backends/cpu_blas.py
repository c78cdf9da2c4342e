"""NumPy's OpenBLAS, which has one thread while experts are computed."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy  # noqa: F401  # which loads what is looked for
from threadpoolctl import ThreadpoolController


@dataclass(frozen=True, eq=False)
class Pool:
    """The threads of one library."""

    get: Callable[[], int]
    set: Callable[[int], object]
    #: Every thread that calls has a number of its own, as OpenMP's do; else the process has one.
    is_by_thread: bool


def numpy_pools() -> tuple[Pool, ...]:
    """Those of the OpenBLAS that NumPy brought along, without one of every OpenBLAS there is; other
    libraries need nothing of what `OneThread` is for."""
    found = ThreadpoolController().select(internal_api="openblas").lib_controllers
    own = [each for each in found if "numpy.libs" in each.filepath]
    return tuple(map(_pool, own or found))


def _pool(library: Any) -> Pool:
    if library.threading_layer == "openmp":
        return Pool(library.get_num_threads, library.set_num_threads, is_by_thread=True)
    # Not threadpoolctl's setter, which does nothing but in the first thread that called it.
    found = library.dynlib
    for prefix, suffix in itertools.product(("", "scipy_"), ("", "64_", "_64")):
        get, set_ = (
            getattr(found, f"{prefix}openblas_{verb}_num_threads{suffix}", None)
            for verb in ("get", "set")
        )
        if get is not None and set_ is not None:
            return Pool(get, set_, is_by_thread=False)
    raise AssertionError(f"{library.filepath} has no openblas_set_num_threads")


class OneThread:
    """Within it each pool has one thread; after it, when nobody is within, as many as before.

    To be entered by each thread that multiplies, any number at a time. Not for speed alone: from
    0.3.28 on OpenBLAS has a lock for each way in which the operands of a product are stored, and
    one set of buffers. Two products that are stored differently, each on several of its threads,
    mix their operands when they run at once (github.com/OpenMathLib/OpenBLAS/issues/5836). A
    product on one thread uses none of that, whatever others compute meanwhile.
    """

    def __init__(self, pools: tuple[Pool, ...]) -> None:
        self._pools = pools
        self._lock = threading.Lock()
        #: Not a count: what an interrupt left here goes with the next call of its thread.
        self._inside: set[int] = set()
        #: What to go back to: of the process, and of each thread.
        self._before: dict[Pool, int] = {}
        self._before_here = threading.local()
        #: Each that is made of them is counted before it is made.
        self._n_changes = 0

    def __enter__(self) -> None:
        if self._is_so_by_itself():
            return
        with self._lock:
            self._inside.add(threading.get_ident())
            # Every time: somebody else may have set it meanwhile.
            for pool in self._pools:
                n_threads = pool.get()
                if n_threads > 1:
                    before = self._here() if pool.is_by_thread else self._before
                    before[pool] = n_threads
                    self._n_changes += 1
                    pool.set(1)

    def _is_so_by_itself(self) -> bool:
        """As in every worker; not because somebody is within, who may leave before this thread."""
        n_changes = self._n_changes
        if any(pool.get() > 1 for pool in self._pools):
            return False
        return not self._before and self._n_changes == n_changes

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if threading.get_ident() not in self._inside:
            return
        with self._lock:
            self._inside.discard(threading.get_ident())
            _restore(self._here())
            if not self._inside:
                # Who looks meanwhile must see that it changes, or that it did.
                self._n_changes += 1
                _restore(self._before)

    def _here(self) -> dict[Pool, int]:
        """Of this thread."""
        try:
            here: dict[Pool, int] = self._before_here.pools
        except AttributeError:
            here = self._before_here.pools = {}
        return here

    def leave_all(self) -> None:
        """In the child of a fork(), which has none of the other threads."""
        self._lock = threading.Lock()
        self._inside.clear()
        _restore(self._here())
        _restore(self._before)


def _restore(before: dict[Pool, int]) -> None:
    while before:
        pool, n_threads = before.popitem()
        # Else somebody wants another number by now.
        if pool.get() == 1:
            pool.set(n_threads)


#: The process's, as the pools are.
ONE_THREAD = OneThread(numpy_pools())
os.register_at_fork(after_in_child=ONE_THREAD.leave_all)
