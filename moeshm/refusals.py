"""Tells clients that they get no session, in threads of its own."""

from __future__ import annotations

import collections
import socket
import threading
from collections.abc import Callable

from . import session
from .errors import HandshakeRefused

#: A client can keep the thread that closes its connection (`foreign_fds`).
_MOST_THREADS = 32
#: Connections that wait for a thread, before no more are accepted.
_MOST_WAITING = 256


class Refusals:
    """Refuses connections without the caller's waiting for anything."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: collections.deque[
            tuple[socket.socket, HandshakeRefused, Callable[[], None]]
        ] = collections.deque()
        self._n_threads = 0

    def put(self, sock: socket.socket, error: HandshakeRefused, then: Callable[[], None]) -> None:
        """Tell it why, hang up, and call `then`; soon."""
        with self._changed:
            self._waiting.append((sock, error, then))
            if self._n_threads == _MOST_THREADS:
                return
            self._n_threads += 1
        try:
            threading.Thread(target=self._work, name="moeshm-refusals", daemon=True).start()
        except RuntimeError:  # the next one that starts takes this, too
            with self._changed:
                self._n_threads -= 1

    def has_room(self) -> bool:
        """False: don't accept more before this is true."""
        return len(self._waiting) < _MOST_WAITING

    def finish(self, timeout_s: float) -> None:
        """Wait until all are told, but no longer than that."""
        with self._changed:
            self._changed.wait_for(lambda: not self._n_threads, timeout_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._n_threads -= 1
                    self._changed.notify_all()
                    return
                sock, error, then = self._waiting.popleft()
            session.refuse(sock, error)
            then()
