"""One end of a ring: the word it publishes, the records it holds, and its waits.

Each end publishes one word, `position << 1 | ARMED`, and keeps its own position privately:

- publish: exchange the word; if ARMED was set, wake the futex;
- wait: load the other's word; spin within the budget; set ARMED by compare-exchange; sleep on
  the word for at most a slice; look for signals and for the peer's death; try again.

Positions are multiples of 64, so bit 1 of the word is free: REBASED flips whenever the producer,
finding the ring empty, starts again at the beginning of the data area, whose memory is still in
the caches. The consumer was then at that very position, so it can follow without a message.

Everything that the other end can write is loaded once, checked, and used from the copy. Positions
count modulo 2^63. docs/ring.md has the reasons.
"""

from cpython.exc cimport PyErr_CheckSignals
from posix.unistd cimport close
from cpython.memoryview cimport PyMemoryView_FromObject
from libc.stdint cimport INT64_MAX, int64_t, uint64_t

import os

from . import process, segment, settings
from ._atomics cimport (
    MOESHM_GIVE_WAY_NS, moeshm_clear_bits, moeshm_compare_exchange, moeshm_exchange,
    moeshm_fork_generation, moeshm_futex_wait, moeshm_futex_wake, moeshm_give_way,
    moeshm_load_acquire, moeshm_load_relaxed, moeshm_now_ns, moeshm_pause, moeshm_peer_is_gone,
    moeshm_store_release, moeshm_watch_forks,
)
from ._crash_points cimport (
    AT_ARM, AT_ARMED, AT_CLOSE, AT_CLOSE_PUBLISHED, AT_CLOSED, AT_FINISH, AT_MARKED_DONE,
    AT_PUBLISH, AT_PUBLISHED, AT_SLEEP, AT_SLEPT, AT_STATE_STORED, AT_WAIT, AT_WAKE, AT_WOKEN,
    crash_point,
)
from ._mapping cimport (
    ALIGNMENT, ATTACHER, CONSUMER_STATE, CONSUMER_WORD, CREATOR, PAGE, PRODUCER, PRODUCER_STATE,
    PRODUCER_WORD, Identity, Mapping, Role,
)
from .errors import Corrupt, ForkedProcess, PeerDied, RingClosed, RingError

moeshm_watch_forks()

# How a slice of a wait ended.
cdef enum:
    CHANGED = 1
    PEER_GONE = 2
    TIMED_OUT = 3
    AGAIN = 4

# Bits of a word that are neither position, REBASED nor ARMED.
cdef uint64_t IMPOSSIBLE_BITS = 0x7C
# A wait looks for signals and for the peer's death this often.
cdef int64_t SLICE_NS = 25_000_000


cdef int64_t deadline_of(object timeout_s) except -1:
    if timeout_s is None:
        return INT64_MAX
    cdef double seconds = timeout_s
    if seconds != seconds:
        raise ValueError("timeout_s is NaN; pass seconds, or None to wait for ever")
    if seconds <= 0:
        return 0
    if seconds > 1e9:
        return INT64_MAX
    return moeshm_now_ns() + <int64_t>(seconds * 1e9)


cdef class RingEnd:
    """What producer and consumer share."""

    def __cinit__(self):
        self.fd = self.socket_fd = self.pidfd = -1
        self.is_closed = True
        self.generation = moeshm_fork_generation

    def __init__(self):
        raise TypeError(f"use {type(self).__name__}.create or .attach")

    def __del__(self):
        self.close()

    cdef int _choose_spin(self, object spin_us) except -1:
        if spin_us is None:
            # With one CPU for both ends, spinning only keeps the other from running.
            spin_us = settings.current().spin_us if process.usable_cpus() > 1 else 0
        self.spin_us = spin_us
        return 0

    cdef int _open(self, Mapping mapping, Role role, int fd, object name,
                   bint is_creator) except -1:
        """Be the given end of a mapped segment; owns `fd` from here on."""
        cdef char *control = mapping.control
        self.mapping = mapping
        self.area = mapping.area
        self.capacity = mapping.area - PAGE
        self.epoch = mapping.header.epoch
        self.name = name
        self.is_creator = is_creator
        if role == PRODUCER:
            self.own = <uint64_t *>(control + PRODUCER_WORD)
            self.own_state = <uint64_t *>(control + PRODUCER_STATE)
            self.peer = <uint64_t *>(control + CONSUMER_WORD)
            self.peer_state = <uint64_t *>(control + CONSUMER_STATE)
        else:
            self.own = <uint64_t *>(control + CONSUMER_WORD)
            self.own_state = <uint64_t *>(control + CONSUMER_STATE)
            self.peer = <uint64_t *>(control + PRODUCER_WORD)
            self.peer_state = <uint64_t *>(control + PRODUCER_STATE)
        self.next_position = self.published = self.peer_position = mapping.header.first_position
        self.seen = mapping.header.first_position << 1
        self.fd = fd
        self.is_closed = False
        return 0

    @property
    def closed(self):
        """True once this end was closed."""
        return self.is_closed

    @property
    def peer_closed(self):
        """True once the other end was closed; what it sent can still be read."""
        self._check_usable()
        return bool(moeshm_load_acquire(self.peer_state) & CLOSED)

    @property
    def outstanding(self):
        """Records that this end holds: reserved and not yet published, or acquired and not yet
        freed for the producer."""
        return self.window.count

    @property
    def spin_us(self):
        """The longest busy wait, in microseconds; 0 sleeps at once."""
        return self.spin_cap_ns / 1e3

    @spin_us.setter
    def spin_us(self, double value):
        if not 0 <= value <= 1e9:
            raise ValueError(f"spin_us={value}; it must lie in 0..1e9")
        self.spin_cap_ns = self.spin_ns = <int64_t>(value * 1e3)

    def counters(self):
        """How often this end waited, slept in the kernel, and woke the other."""
        # Counted by a thread that has released the GIL.
        cdef uint64_t sleeps = moeshm_load_relaxed(&self.sleeps)
        return {"waits": self.waits, "sleeps": sleeps, "wakes": self.wakes}

    def fileno(self):
        """The segment's file descriptor, to be passed to the process of the other end."""
        self._check_usable()
        return self.fd

    def memory(self):
        """Where all its records lie: the data area, twice in a row; read-only for a consumer.

        It stays mapped while this view of it is in use, also when the end is closed.
        """
        self._check_usable()
        return PyMemoryView_FromObject(self.mapping)

    def watch(self, int socket_fd=-1, int pidfd=-1):
        """Take the hang-up of a socket or the end of a pidfd's process for the peer's death.

        Both stay the caller's, who keeps them open while this end is. A named ring that is not
        told finds its peer by the pid that this left in the segment.
        """
        self._check_usable()
        self.socket_fd = socket_fd
        if self.owns_pidfd:
            os.close(self.pidfd)
            self.owns_pidfd = False
        self.pidfd = pidfd
        self.knows_peer = True

    def close(self):
        """Close this end; the other reads what was committed and then gets RingClosed."""
        if self.is_closed:
            return
        self.is_closed = True
        cdef bint is_ours = self.generation == moeshm_fork_generation
        try:
            if is_ours:
                self._end()
        finally:
            # A thread that waits still looks at the memory: it lets go when it is done. After a
            # fork, that thread is the parent's.
            if not (self.waiting and is_ours):
                self._let_go()

    cdef int _end(self) except -1:
        """Tell the other end, and a thread of our own that sleeps on the other's word."""
        if self.corruption is None:
            crash_point(AT_CLOSE, self.own)
            moeshm_store_release(self.own_state, CLOSED)
            crash_point(AT_STATE_STORED, self.own)
            self._publish()
            crash_point(AT_CLOSE_PUBLISHED, self.own)
            # A thread that armed it and does not sleep yet must not find it as it left it.
            moeshm_clear_bits(self.peer, ARMED)
            moeshm_futex_wake(self.peer)
            crash_point(AT_CLOSED, self.own)
        if self.name is not None and self.is_creator and not self._peer_identity().pid:
            segment.unlink(self.name)
        return 0

    cdef int _let_go(self) except -1:
        """Of the memory and the fds; again does nothing."""
        cdef int fd = self.fd, pidfd = self.pidfd if self.owns_pidfd else -1
        self.mapping = None
        self.fd = self.pidfd = -1
        self.owns_pidfd = False
        # Neither makes anybody wait, and os.close lets another thread compute.
        if fd >= 0:
            close(fd)
        if pidfd >= 0:
            close(pidfd)
        return 0

    cdef int _check_usable(self) except -1:
        if self.is_closed:
            raise RingClosed("this end of the ring is closed")
        if self.generation != moeshm_fork_generation:
            raise ForkedProcess(
                f"this ring was opened by the parent of process {os.getpid()}; "
                "open one after fork()")
        if self.corruption is not None:
            raise Corrupt(self.corruption)
        return 0

    cdef int _check_may_take(self, str remedy) except -1:
        """Usable, by this thread, and with a free slot; must hold where `_hold` is called."""
        self._check_usable()
        if self.waiting:
            # It found a free slot, and relies on that when its wait ends.
            raise RingError("another thread waits at this end of the ring; one may at a time")
        if self.window.count == SLOTS:
            raise RingError(f"{SLOTS} {remedy}")
        return 0

    cdef bint _may_touch(self) noexcept:
        """Open, opened by this process, and not corrupt."""
        return (not self.is_closed and self.generation == moeshm_fork_generation
                and self.corruption is None)

    cdef int _corrupt(self, str what) except -1:
        self.corruption = f"the other end of the ring wrote {what}; close the ring"
        raise Corrupt(self.corruption)

    cdef bint _load_peer(self) noexcept nogil:
        """Load the other's word; False when it is impossible. Follows a rebase."""
        cdef uint64_t word = moeshm_load_acquire(self.peer) & ~<uint64_t>ARMED
        cdef uint64_t position = word >> 1 & ~<uint64_t>(ALIGNMENT - 1)
        self.seen = word
        if word & IMPOSSIBLE_BITS:
            return False
        # It may move on by what it has not yet used of what we published (the consumer) or by
        # what we have freed (the producer): in both cases at most the area ahead of us.
        if ahead(position, self.peer_position) > self.area:
            return False
        self.peer_position = position
        return True

    cdef int _wait(self, int64_t deadline_ns) except -1:
        """Return 1 when the other's word is no longer `seen`, 0 at the deadline.

        RingClosed, PeerDied: and everything that the other end did before was seen. The caller
        has called `_check_may_take`, and nothing after it that runs Python.
        """
        cdef uint64_t seen = self.seen
        cdef int64_t start = moeshm_now_ns()
        cdef int64_t spin_until = start + self.spin_ns
        cdef bint slept = False
        cdef int outcome = AGAIN
        self.waits += 1
        self.waiting = True
        try:
            while outcome == AGAIN:
                with nogil:
                    outcome = self._wait_slice(seen, spin_until, deadline_ns, &slept)
                if outcome == AGAIN or outcome == TIMED_OUT:
                    PyErr_CheckSignals()
                    if self._peer_is_dead():
                        outcome = PEER_GONE
                # Asked last: what ran above ran Python, and may have closed this end.
                if self.is_closed:
                    raise RingClosed("this end of the ring was closed by another thread")
            if outcome == PEER_GONE:
                return self._drain(seen)
        finally:
            self.waiting = False
            if self.is_closed:
                self._let_go()
        if slept:
            self._adapt(moeshm_now_ns() - start)
        return outcome == CHANGED

    cdef int _wait_slice(self, uint64_t seen, int64_t spin_until, int64_t deadline_ns,
                         bint *slept) noexcept nogil:
        """Spin within the budget, then sleep; at most for SLICE_NS.

        The steps are those of the model: load, arm by compare-exchange, sleep on the armed word.
        """
        cdef int64_t now = moeshm_now_ns()
        cdef int64_t slice_until = now + SLICE_NS, give_way_at = now + MOESHM_GIVE_WAY_NS
        cdef uint64_t word
        cdef int _i
        crash_point(AT_WAIT, self.own)
        while True:
            for _i in range(16):
                word = moeshm_load_acquire(self.peer)
                if word & ~<uint64_t>ARMED != seen:
                    return CHANGED
                moeshm_pause()
            if moeshm_load_acquire(self.peer_state) & CLOSED:
                return PEER_GONE
            now = moeshm_now_ns()
            if now >= deadline_ns:
                return TIMED_OUT
            if now >= spin_until:
                break
            if now >= slice_until:
                return AGAIN
            if now >= give_way_at:
                moeshm_give_way()
                give_way_at = now + MOESHM_GIVE_WAY_NS
        crash_point(AT_ARM, self.own)
        if not word & ARMED and not moeshm_compare_exchange(self.peer, word, word | ARMED):
            return AGAIN
        crash_point(AT_ARMED, self.own)
        # Once armed: an end that closes either wakes us or was seen here.
        if moeshm_load_acquire(self.peer_state) & CLOSED:
            return PEER_GONE
        # Closed by another thread of our own. (`is_closed` is for those who hold the GIL.)
        if moeshm_load_acquire(self.own_state) & CLOSED:
            return AGAIN
        moeshm_store_release(&self.sleeps, self.sleeps + 1)
        slept[0] = True
        crash_point(AT_SLEEP, self.own)
        moeshm_futex_wait(self.peer, word | ARMED, min(SLICE_NS, deadline_ns - now))
        crash_point(AT_SLEPT, self.own)
        return CHANGED if moeshm_load_acquire(self.peer) & ~<uint64_t>ARMED != seen else AGAIN

    cdef void _adapt(self, int64_t waited_ns) noexcept:
        """After a sleep: spin for the whole cap if that would have done, half as long if not."""
        if waited_ns <= self.spin_cap_ns and self.spin_ns:
            self.spin_ns = self.spin_cap_ns
        elif self.spin_ns > self.spin_cap_ns >> 5:
            self.spin_ns >>= 1

    cdef int _drain(self, uint64_t seen) except -1:
        """The other end closed or died: what it published before comes first."""
        cdef bint is_closed = moeshm_load_acquire(self.peer_state) & CLOSED
        if moeshm_load_acquire(self.peer) & ~<uint64_t>ARMED != seen:
            return 1
        # A process that closes its end and exits closed it.
        if is_closed:
            raise RingClosed("the other end of the ring is closed, and all it sent was read")
        raise PeerDied("the other end's process is gone, and all it sent was read")

    cdef bint _peer_is_dead(self) except -1:
        cdef Identity peer
        if not self.knows_peer:
            peer = self._peer_identity()
            if peer.pid == 0:
                return False
            if peer.pid != <uint64_t>os.getpid():
                self.pidfd = process.open_pidfd(peer.pid, peer.ticks)
                if self.pidfd < 0:
                    # Gone, or a kernel without pidfds, or no fd to be had.
                    return not process.is_alive(peer.pid, peer.ticks)
                self.owns_pidfd = True
            self.knows_peer = True
        return moeshm_peer_is_gone(self.socket_fd, self.pidfd)

    cdef Identity _peer_identity(self):
        cdef Identity *at = <Identity *>(
            self.mapping.control + (ATTACHER if self.is_creator else CREATOR))
        cdef Identity identity
        identity.pid = moeshm_load_acquire(&at.pid)
        identity.ticks = moeshm_load_relaxed(&at.ticks)
        return identity

    cdef void _publish(self) noexcept nogil:
        cdef uint64_t word = self.published << 1 | self.rebased
        cdef bint was_armed
        crash_point(AT_PUBLISH, self.own)
        was_armed = moeshm_exchange(self.own, word) & ARMED
        crash_point(AT_PUBLISHED, self.own)
        if was_armed:
            self.wakes += 1
            crash_point(AT_WAKE, self.own)
            moeshm_futex_wake(self.own)
            crash_point(AT_WOKEN, self.own)

    cdef void _skip(self, uint64_t size) noexcept:
        """Pass over `size` bytes: they are published with the record before them, or at once."""
        cdef unsigned slot = self._hold(size)
        if self.window.count == 1:
            self._finish(slot)
        else:
            self.window.count -= 1
            self.window.spans[(slot + SLOTS - 1) % SLOTS].size += size

    cdef unsigned _hold(self, uint64_t size) noexcept:
        """Take `size` bytes at the next position into the window; its slot."""
        cdef unsigned slot = (self.window.first + self.window.count) % SLOTS
        self.window.spans[slot].size = size
        self.window.spans[slot].done = False
        self.window.count += 1
        self.next_position = ahead(self.next_position + size, 0)
        self.next_offset += size
        if self.next_offset >= self.area:
            self.next_offset -= self.area
        self.next_sequence += 1
        return slot

    cdef void _finish(self, unsigned slot) noexcept:
        """Publish every record up to the first that is still open."""
        crash_point(AT_FINISH, self.own)
        self.window.spans[slot].done = True
        crash_point(AT_MARKED_DONE, self.own)
        if slot != self.window.first:
            return
        while self.window.count and self.window.spans[self.window.first].done:
            self.published += self.window.spans[self.window.first].size
            self.window.first = (self.window.first + 1) % SLOTS
            self.window.count -= 1
        self.published = ahead(self.published, 0)
        self._publish()
