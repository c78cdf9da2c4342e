"""Whose call a worker computes next."""

from __future__ import annotations

import collections
import threading
from types import TracebackType


class Turns:
    """A lock that is first come, first served: every session computes one call in its turn."""

    def __init__(self) -> None:
        self._taken = threading.Lock()
        self._guard = threading.Lock()
        self._queue: collections.deque[threading.Lock] = collections.deque()

    def __enter__(self) -> None:
        # Most often nobody else wants it.
        if not self._queue and self._taken.acquire(blocking=False):
            return
        gate = threading.Lock()
        gate.acquire()
        with self._guard:
            self._queue.append(gate)
        self._hand_over_if_free()
        gate.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._queue:
            self._hand_over()
            return
        self._taken.release()
        # Who queued up in between did not find it free.
        self._hand_over_if_free()

    def _hand_over_if_free(self) -> None:
        if self._queue and self._taken.acquire(blocking=False):
            self._hand_over()

    def _hand_over(self) -> None:
        """Let the next in the queue have it without its ever being free; the caller has it."""
        with self._guard:
            if self._queue:
                self._queue.popleft().release()
                return
        self._taken.release()
        self._hand_over_if_free()
