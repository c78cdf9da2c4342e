"""What a client did: counts and times, as `client.stats()` shows them."""

from __future__ import annotations

import threading
import time
from collections import Counter

import msgspec

from ._totals import Totals
from .receivers import Answer


class CallTimes(msgspec.Struct, frozen=True, gc=False):
    """One call that is over; the times as in `ClientStats`, in ns, for all of its messages."""

    messages: int
    bytes_out: int
    bytes_in: int
    pack_ns: int
    wait_ns: int
    compute_ns: int
    unpack_ns: int
    #: From the beginning of sending until the result was there.
    elapsed_ns: int


class ClientStats(msgspec.Struct, frozen=True, kw_only=True):
    """Since the client was opened. Times are sums over calls, in seconds.

    A call that was cut into several counts once in `calls` and once in `messages` for each.
    """

    calls: int
    #: Rows that were sent; those without an expert stay here.
    rows: int
    messages: int
    #: Bytes of requests and replies, headers included.
    bytes_out: int
    bytes_in: int
    #: Checking, converting and sending the inputs.
    pack_s: float
    #: Waiting for replies.
    wait_s: float
    #: The worker's own time in its backend, as it reports it. Most of it falls into `wait_s`; it
    #: may begin while the call is still being packed.
    compute_s: float
    #: Copying and converting the results.
    unpack_s: float
    #: Calls that the fallback computed, and why: "worker_died" or "deadline".
    fallback_calls: int
    fallbacks: dict[str, int]
    #: Why a worker could not give the transport that was wished for, and how often.
    stepped_down: dict[str, int]
    #: Sessions after the first, and how many of them needed a new worker process.
    reconnects: int
    worker_restarts: int


class StatsCounter:
    """Adds up. Any thread may tell it of anything."""

    def __init__(self) -> None:
        self._totals = Totals()
        #: Told of every call, and so without a step in between; as `Totals` says.
        self.sent = self._totals.sent
        self.received = self._totals.received
        self.taken = self._totals.taken
        self._lock = threading.Lock()
        self._fallbacks: Counter[str] = Counter()
        self._stepped_down: Counter[str] = Counter()
        self._reconnects = self._worker_restarts = 0

    def stepped_down(self, why: str) -> bool:
        """Arrays on the engine's GPU go another way than they might; True the first time."""
        with self._lock:
            self._stepped_down[why] += 1
            return self._stepped_down[why] == 1

    def answered(self, answer: Answer, rows: int, start_ns: int) -> None:
        """A call that began at `start_ns` (of time.perf_counter) is over."""
        self.sent(1, rows, answer.bytes_out, answer.sent_ns - start_ns)
        self.received(
            answer.bytes_in,
            answer.arrived_ns - answer.sent_ns,
            answer.compute_ns,
            time.perf_counter_ns() - answer.arrived_ns,
        )

    def fell_back(self, cause: str) -> bool:
        """A call went to the fallback; True the first time for this cause."""
        with self._lock:
            self._fallbacks[cause] += 1
            return self._fallbacks[cause] == 1

    def connected(self, is_first: bool, is_new_process: bool, stepped_down: str) -> None:
        """A session was opened."""
        with self._lock:
            if not is_first:
                self._reconnects += 1
                self._worker_restarts += is_new_process
            if stepped_down:
                self._stepped_down[stepped_down] += 1

    def snapshot(self) -> ClientStats:
        """The figures now."""
        calls, rows, messages, bytes_out, bytes_in, *times_ns = self._totals.read()
        pack_s, wait_s, compute_s, unpack_s = (each / 1e9 for each in times_ns)
        with self._lock:
            return ClientStats(
                calls=calls,
                rows=rows,
                messages=messages,
                bytes_out=bytes_out,
                bytes_in=bytes_in,
                pack_s=pack_s,
                wait_s=wait_s,
                compute_s=compute_s,
                unpack_s=unpack_s,
                fallback_calls=self._fallbacks.total(),
                fallbacks=dict(self._fallbacks),
                stepped_down=dict(self._stepped_down),
                reconnects=self._reconnects,
                worker_restarts=self._worker_restarts,
            )
