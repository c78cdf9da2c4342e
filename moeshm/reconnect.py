"""Looks for a lost worker: one attempt at a time, in a thread of its own.

A worker may take minutes to load, and one that hangs takes the whole connect timeout; a call waits
for that no longer than it can afford.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ._role import Monitor
from .errors import ClientClosed, WorkerDied
from .link import Link

#: After a failed attempt calls do not try for so long, and twice as long after each further one.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
#: How long a call that could be computed elsewhere waits for the attempt that it started.
FALLBACK_PATIENCE_S = 2.0


class _Attempt:
    def __init__(self) -> None:
        #: A thread is at it: of several, which an interrupt of who starts one may leave, the first.
        self.is_begun = False
        #: Not the thread's own end: an interrupted `join` takes a thread for ended.
        self.is_over = False
        self.link: Link | None = None
        self.error: Exception | None = None


class Reconnector:
    """`discard` ends what an attempt leaves should the client be closed in the meantime."""

    def __init__(self, discard: Callable[[], None]) -> None:
        self._discard = discard
        self._lock = Monitor()
        self._attempt: _Attempt | None = None
        self._is_closed = False
        self._pause_s = 0.0
        self._retry_at = 0.0

    def link(
        self,
        connect: Callable[[], Link],
        current: Callable[[], Link],
        deadline: float,
        has_fallback: bool,
    ) -> Link:
        """The session that lives, once an attempt to `connect` succeeds; starts one unless one is
        under way or the last failed a moment ago.

        `connect` makes what it opens the one that `current` gives. Waits until `deadline` (of
        time.monotonic); with a fallback, for FALLBACK_PATIENCE_S if it starts the attempt, and
        not at all otherwise. WorkerDied: there is no session yet.
        """
        patience_s = deadline - time.monotonic()
        with self._lock:
            # Another thread's attempt may have been over a moment ago.
            link = current()
            if link.loss is None:
                return link
            attempt = self._attempt
            if attempt is None:
                if time.monotonic() < self._retry_at:
                    # Not itself: an exception that is raised again keeps the frames of each call.
                    raise WorkerDied(str(link.loss))
                attempt = self._attempt = _Attempt()
                if has_fallback:
                    patience_s = min(patience_s, FALLBACK_PATIENCE_S)
            elif has_fallback:
                patience_s = 0.0
        if not attempt.is_begun:
            self._start(attempt, connect)
        if not self._wait(attempt, patience_s):
            raise WorkerDied(f"{link.loss}; the worker is looked for, and not there yet")
        if attempt.link is None:
            error = attempt.error
            raise WorkerDied(f"the worker was lost and cannot be reached: {error}") from error
        return attempt.link

    def close(self) -> None:
        """End an attempt that nobody waits for, now or when it is over."""
        with self._lock:
            self._is_closed = True
            attempt, self._attempt = self._attempt, None
        if attempt is not None and attempt.link is not None:
            attempt.link.close(ClientClosed("the client is closed"))

    def _start(self, attempt: _Attempt, connect: Callable[[], Link]) -> None:
        thread = threading.Thread(
            target=self._run, args=(attempt, connect), name="moeshm-reconnect", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:
            # It waits for the thread by a threading.Condition: what a signal's handler raises in
            # there may leave the lock free, which that finds wrong.
            interrupt = error.__context__
            if interrupt is None or isinstance(interrupt, Exception):
                raise
            raise interrupt from None

    def _wait(self, attempt: _Attempt, patience_s: float) -> bool:
        until = time.monotonic() + patience_s
        with self._lock:
            while not attempt.is_over:
                left_s = until - time.monotonic()
                if left_s <= 0:
                    return False
                self._lock.wait(left_s)
        return True

    def _run(self, attempt: _Attempt, connect: Callable[[], Link]) -> None:
        with self._lock:
            if attempt.is_begun:
                return
            attempt.is_begun = True
        try:
            attempt.link = connect()
        except Exception as error:  # whatever it is, calls must hear of it
            attempt.error = error
        with self._lock:
            is_closed = self._is_closed
            if self._attempt is attempt:
                self._attempt = None
                self._note(attempt.error)
            attempt.is_over = True
            self._lock.notify_all()
        if is_closed:
            if attempt.link is not None:
                attempt.link.close(ClientClosed("the client was closed"))
            self._discard()

    def _note(self, error: Exception | None) -> None:
        if error is None:
            self._pause_s = self._retry_at = 0.0
            return
        self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s or FIRST_PAUSE_S)
        self._retry_at = time.monotonic() + self._pause_s
