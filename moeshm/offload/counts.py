"""What an offload did: slots by who computed them, messages, bytes and times."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

import msgspec

from ..policy import ChooserStats
from ..stats import CallTimes
from .remote import Remote


class OffloadStats(msgspec.Struct, frozen=True, kw_only=True):
    """Since the offload was made. A slot is one (token, expert) pair.

    A call is what one forward sends to one worker, in one or more messages; lost ones count in
    `losses` alone. Times are sums over calls, in seconds, and mean what they do in `ClientStats`.
    """

    forwards: int
    #: Of these, with arrays on the engine's GPU, each of which waits for their stream to bring ids
    #: and weights to the host; and how many of them brought all the rows, too.
    gpu_forwards: int
    brought: int
    hot_slots: int
    #: By worker, the slots that it computed.
    cold_slots: dict[str, int]
    #: By worker, in how many forwards it was lost with slots on their way, by one way or several.
    losses: dict[str, int]
    #: Slots that the fallback computed, by the cause: "worker_died", "deadline", "worker_down".
    fallback_slots: dict[str, int]
    #: How often the fallback computed for a forward.
    fallback_calls: int
    calls: int
    messages: int
    #: Rows that were sent, over all workers; those without a cold expert stay.
    rows: int
    bytes_out: int
    bytes_in: int
    pack_s: float
    wait_s: float
    #: Of workers that tell: outputs in slabs come without a word of it.
    compute_s: float
    unpack_s: float
    #: From the beginning of sending until the result was there; the local part ran meanwhile.
    elapsed_s: float
    #: Placements that were applied after the first, and those that a worker could not follow.
    placements_applied: int
    placements_failed: int
    #: Sessions after the first of each client, and how many of them needed a new worker process.
    reconnects: int
    worker_restarts: int
    #: By worker, which ways there are not to it although the policy allows them, and why.
    stepped_down: dict[str, str]
    #: By worker, how often its policy changed its mind, tried something, and began anew.
    choices: dict[str, ChooserStats]


class OffloadCounter:
    """Adds up; one lock, taken once a part."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forwards = self._hot_slots = self._fallback_calls = 0
        self._gpu_forwards = self._brought = 0
        self._cold_slots: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self._fallback_slots: Counter[str] = Counter()
        self._calls = self._messages = self._rows = self._bytes_out = self._bytes_in = 0
        self._pack_ns = self._wait_ns = self._compute_ns = self._unpack_ns = 0
        self._elapsed_ns = 0
        self._applied = self._failed = 0

    def finished(self, hot_slots: int, on_gpu: bool) -> None:
        """A forward is over."""
        with self._lock:
            self._forwards += 1
            self._gpu_forwards += on_gpu
            self._hot_slots += hot_slots

    def brought(self) -> None:
        """A forward's rows were brought from the engine's GPU."""
        with self._lock:
            self._brought += 1

    def succeeded(self, worker: str, rows: int, slots: int, times: CallTimes) -> None:
        """A worker computed so many slots of so many rows."""
        with self._lock:
            self._cold_slots[worker] += slots
            self._rows += rows
            self._calls += 1
            self._messages += times.messages
            self._bytes_out += times.bytes_out
            self._bytes_in += times.bytes_in
            self._pack_ns += times.pack_ns
            self._wait_ns += times.wait_ns
            self._compute_ns += times.compute_ns
            self._unpack_ns += times.unpack_ns
            self._elapsed_ns += times.elapsed_ns

    def lost(self, worker: str) -> bool:
        """A worker was lost with slots on their way; True the first time."""
        with self._lock:
            self._losses[worker] += 1
            return self._losses[worker] == 1

    def fell_back(self, cause: str, slots: int) -> bool:
        """The fallback computed so many slots; True the first time for this cause."""
        with self._lock:
            is_first = cause not in self._fallback_slots
            self._fallback_slots[cause] += slots
            self._fallback_calls += 1
            return is_first

    def applied(self, is_done: bool) -> None:
        """A placement was applied, or failed to be."""
        with self._lock:
            self._applied += is_done
            self._failed += not is_done

    def snapshot(self, remotes: Iterable[Remote]) -> OffloadStats:
        """The figures now, with those that the workers' clients and policies keep."""
        remotes = list(remotes)
        clients = [client.stats() for each in remotes for client in each.sessions]
        with self._lock:
            return OffloadStats(
                forwards=self._forwards,
                gpu_forwards=self._gpu_forwards,
                brought=self._brought,
                hot_slots=self._hot_slots,
                cold_slots=dict(self._cold_slots),
                losses=dict(self._losses),
                fallback_slots=dict(self._fallback_slots),
                fallback_calls=self._fallback_calls,
                calls=self._calls,
                messages=self._messages,
                rows=self._rows,
                bytes_out=self._bytes_out,
                bytes_in=self._bytes_in,
                pack_s=self._pack_ns / 1e9,
                wait_s=self._wait_ns / 1e9,
                compute_s=self._compute_ns / 1e9,
                unpack_s=self._unpack_ns / 1e9,
                elapsed_s=self._elapsed_ns / 1e9,
                placements_applied=self._applied,
                placements_failed=self._failed,
                reconnects=sum(each.reconnects for each in clients),
                worker_restarts=sum(each.worker_restarts for each in clients),
                stepped_down={
                    each.name: each.stepped_down for each in remotes if each.stepped_down
                },
                choices={each.name: each.chooser.stats() for each in remotes},
            )
