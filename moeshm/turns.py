"""Whose call a worker computes next: turns go round the clients, whatever each of them sends."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Hashable

from .errors import DeadlineExceeded

#: Calls of more tokens are long: they pause between steps, and have much memory. Shorter ones, as
#: a decode's, are computed in one turn, or every step of a prefill would come in between.
MANY_TOKENS = 32
#: How long a long call goes on at most while only other long ones wait; less for one that takes
#: less. To stop 16 threads and to start them again at every step took 43 % of two prefills'
#: throughput; with this, 9 %.
LONG_TURN_NS = 50_000_000


class _Client:
    """A client process, as its sessions have it in common."""

    def __init__(self, served: int) -> None:
        #: Greater than that of clients that were served before it.
        self.served = served
        #: What its last long call took; as long as any before that is known.
        self.ns_per_token: float = LONG_TURN_NS


class Turns:
    """One call, or one step of a long one, is computed at a time.

    The next turn is that of the client that has gone longest without; of its sessions, that of the
    one that waits longest. So with n clients that want turns, at most n - 1 of others come between
    two of one client, however many sessions it has and however long its calls are.

    A client has one long call in its middle, as each keeps its workspace: those of its other
    sessions begin when that ends. Short ones do not wait for that.
    """

    def __init__(self) -> None:
        self._taken = threading.Lock()
        #: Held by whoever changes what is below.
        self._guard = threading.Lock()
        #: Those that wait, in the order in which they came.
        self._queue: list[Place] = []
        self._clients: weakref.WeakValueDictionary[Hashable, _Client] = (
            weakref.WeakValueDictionary()
        )
        self._served = 0

    def place(self, client: Hashable) -> Place:
        """A place for one session of the client: one thread's."""
        with self._guard:
            found = self._clients.get(client)
            if found is None:
                # Behind those that wait, and before the one that has the turn.
                found = self._clients[client] = _Client(self._served)
            return Place(self, found)

    # --- for places -----------------------------------------------------------------------

    def _hand_over(self, client: _Client | None) -> bool:
        """Let the next have it without its ever being free; the caller has it, for this client,
        and the guard. False: nobody waits."""
        if client is not None:
            self._served += 1
            client.served = self._served
        if not self._queue:
            return False
        place = self._next()
        self._queue.remove(place)
        place._gate.release()
        return True

    def _next(self) -> Place:
        # The first of equals.
        return min(self._ready(), key=lambda each: each._client.served)

    def _ready(self) -> list[Place]:
        """Those that may have the next turn; for who has the guard."""
        busy = [each._client for each in self._queue if each._is_interrupted and each._is_long]
        # All but those of a client that has one in its middle, which waits itself.
        return [
            each
            for each in self._queue
            if each._is_interrupted or not each._is_long or each._client not in busy
        ]

    def _hand_over_if_free(self) -> None:
        """For who comes, and for who made it free: of both, one finds the other."""
        while self._queue and self._taken.acquire(blocking=False):
            with self._guard:
                if self._hand_over(None):
                    return
            self._taken.release()


class Place:
    """One session's place among those that compute."""

    def __init__(self, turns: Turns, client: _Client) -> None:
        self._turns = turns
        self._client = client
        #: Released by whoever hands the turn over.
        self._gate = threading.Lock()
        self._gate.acquire()
        #: Of the call whose turn it is or will be.
        self._is_long = self._is_interrupted = False
        self._n_tokens = 0
        #: What its turns took that are over.
        self._spent_ns = 0
        #: It left the queue in the middle of a call.
        self._is_out = False
        #: When it got its turn.
        self._since_ns = 0

    def take(self, deadline_ns: int, n_tokens: int) -> None:
        """Wait for a turn, and have it until `leave`, for a call of so many tokens.

        DeadlineExceeded: the call's deadline (of CLOCK_MONOTONIC in ns; 0 or less for none) passed
        before; there is no turn then.
        """
        turns = self._turns
        self._is_long = n_tokens > MANY_TOKENS
        if self._is_long:
            self._n_tokens, self._spent_ns = n_tokens, 0
            self._since_ns = time.monotonic_ns()
        # Most often nobody else wants it.
        if not turns._queue and turns._taken.acquire(blocking=False):
            return
        with turns._guard:
            turns._queue.append(self)
        turns._hand_over_if_free()
        self._wait(deadline_ns)

    def finished(self) -> None:
        """Before `leave`: the call was computed to its end."""
        if self._is_long:
            spent_ns = self._spent_ns + time.monotonic_ns() - self._since_ns
            self._client.ns_per_token = spent_ns / self._n_tokens

    def leave(self) -> None:
        """The turn is over."""
        turns = self._turns
        if self._is_out:
            self._is_out = False
            return
        if turns._queue:
            with turns._guard:
                if turns._hand_over(self._client):
                    return
        turns._taken.release()
        # Who queued up in between did not find it free.
        turns._hand_over_if_free()

    def is_wanted(self) -> bool:
        """Whether a long call should pause: a short one waits, or another client's long one, and
        this one's turn was as long as that one's will be. So both have the same time."""
        if not self._is_long or not self._turns._queue:
            return False
        turn_ns = time.monotonic_ns() - self._since_ns
        with self._turns._guard:
            return any(
                not each._is_long
                or (each._client is not self._client and turn_ns >= each._next_turn_ns())
                for each in self._turns._ready()
            )

    def _next_turn_ns(self) -> float:
        """How long the turn will be that this long call waits for."""
        left_ns = self._n_tokens * self._client.ns_per_token - self._spent_ns
        # One that took all of that knows no better than one that knows nothing.
        return min(left_ns, LONG_TURN_NS) if left_ns > 0 else LONG_TURN_NS

    def offer(self, deadline_ns: int) -> None:
        """Between two steps of a call: let the next one compute, if there is one, and wait.

        DeadlineExceeded: the call's deadline passed meanwhile; there is no turn any more, and
        `leave` does nothing.
        """
        turns = self._turns
        with turns._guard:
            if not turns._queue:
                return
            self._is_interrupted = True
            self._spent_ns += time.monotonic_ns() - self._since_ns
            turns._queue.append(self)
            turns._hand_over(self._client)
        try:
            self._wait(deadline_ns)
        except DeadlineExceeded:
            self._is_out = True
            raise
        finally:
            self._is_interrupted = False

    def _wait(self, deadline_ns: int) -> None:
        left_s = -1.0
        if deadline_ns > 0:
            left_s = (deadline_ns - time.monotonic_ns()) / 1e9
            left_s = min(max(0.0, left_s), threading.TIMEOUT_MAX)
        if self._gate.acquire(timeout=left_s):
            self._since_ns = time.monotonic_ns()
            return
        with self._turns._guard:
            if self in self._turns._queue:
                self._turns._queue.remove(self)
                raise deadline_passed(is_begun=self._is_interrupted)
        # Handed over at the last moment.
        self._gate.acquire()
        self._since_ns = time.monotonic_ns()


def deadline_passed(is_begun: bool) -> DeadlineExceeded:
    """What a call is told that waited for its turn, or was in its middle."""
    when = "between two steps of the call" if is_begun else "before the call's turn came"
    return DeadlineExceeded(f"the deadline passed {when}; send less at once, or allow more time")
