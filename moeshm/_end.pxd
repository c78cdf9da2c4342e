from libc.stdint cimport int64_t, uint64_t

from ._mapping cimport Identity, Mapping, Role

cdef enum:
    ARMED = 1       # in a word: the other end sleeps on it, or is about to
    REBASED = 2     # in a word: flips when the producer goes back to the beginning
    CLOSED = 1      # in a state: this end was closed

cdef enum:
    SLOTS = 64      # most records that one end may hold at a time


cdef struct Span:
    uint64_t size   # bytes of the data area, header and padding included
    bint done       # committed, aborted or released


# The records that one end holds, oldest first: their order is the order of publication.
cdef struct Window:
    Span spans[SLOTS]
    unsigned first
    unsigned count


cdef inline uint64_t ahead(uint64_t position, uint64_t of) noexcept nogil:
    """Bytes from one position on to another, which lies at or before it."""
    return (position - of) & <uint64_t>0x7FFFFFFFFFFFFFFF


# CLOCK_MONOTONIC of a timeout in seconds; never, for None.
cdef int64_t deadline_of(object timeout_s) except -1


cdef class RingEnd:
    cdef Mapping mapping
    cdef uint64_t *own          # the word that this end publishes
    cdef uint64_t *peer         # the word that the other end publishes
    cdef uint64_t *own_state
    cdef uint64_t *peer_state
    cdef uint64_t area          # bytes of the data area
    cdef readonly uint64_t capacity
    cdef readonly uint64_t epoch
    cdef readonly object name
    cdef int fd
    cdef unsigned generation    # of forks, when it was opened
    cdef bint is_creator
    cdef bint is_closed
    cdef bint waiting           # a thread of this end is inside a wait
    cdef object corruption      # what the other end did, once it did

    # Private positions: never read again from shared memory.
    cdef uint64_t next_position     # where the next record starts
    cdef uint64_t next_offset       # the same place, in the data area
    cdef uint64_t next_sequence
    cdef uint64_t published         # what `own` says
    cdef uint64_t peer_position     # what `peer` said last
    cdef uint64_t seen              # the whole word that said so, less ARMED
    cdef uint64_t rebased           # REBASED bit as this end knows it
    cdef Window window

    cdef int64_t spin_cap_ns
    cdef int64_t spin_ns
    cdef int socket_fd
    cdef int pidfd
    cdef bint owns_pidfd
    cdef bint knows_peer
    cdef uint64_t wakes, sleeps, waits

    cdef int _choose_spin(self, object spin_us) except -1
    cdef int _open(self, Mapping mapping, Role role, int fd, object name,
                   bint is_creator) except -1
    cdef int _end(self) except -1
    cdef int _let_go(self) except -1
    cdef int _check_usable(self) except -1
    cdef int _check_may_take(self, str remedy) except -1
    cdef bint _may_touch(self) noexcept
    cdef int _corrupt(self, str what) except -1
    cdef bint _load_peer(self) noexcept nogil
    cdef int _wait(self, int64_t deadline_ns) except -1
    cdef int _wait_slice(self, uint64_t seen, int64_t spin_until, int64_t deadline_ns,
                         bint *slept) noexcept nogil
    cdef void _adapt(self, int64_t waited_ns) noexcept
    cdef int _drain(self, uint64_t seen) except -1
    cdef bint _peer_is_dead(self) except -1
    cdef Identity _peer_identity(self)
    cdef void _publish(self) noexcept nogil
    cdef void _skip(self, uint64_t size) noexcept
    cdef unsigned _hold(self, uint64_t size) noexcept
    cdef void _finish(self, unsigned slot) noexcept
