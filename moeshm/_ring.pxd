from libc.stdint cimport int64_t, uint32_t, uint64_t

from ._end cimport RingEnd
from ._mapping cimport Mapping

# What stands before each payload.
cdef struct Header:
    uint64_t length
    uint32_t type
    uint32_t flags
    uint64_t epoch
    uint64_t sequence


cdef class RingProducer(RingEnd):
    cdef char *_make_room(self, uint64_t size, int64_t deadline_ns) except NULL
    cdef char *_begin(self, uint64_t length, uint32_t type, uint32_t flags, object timeout_s,
                      unsigned *slot, uint64_t *sequence) except NULL
    cdef int _check_peer(self) except -1


cdef class RingConsumer(RingEnd):
    cdef int _pause_skipping(self, int64_t deadline_ns, object timeout_s) except -1
    cdef bint _has_record(self) except -1
    cdef uint64_t _check_header(self, Header *header) except 0


cdef class Held:
    cdef RingEnd ring
    cdef Mapping mapping        # keeps the memory mapped for as long as anything views it
    cdef char *payload
    cdef uint64_t size
    cdef readonly uint64_t sequence
    cdef unsigned slot
    cdef int exports            # views that are alive
    cdef bint is_open
    cdef bint is_writable
    cdef object view            # what `with` gave of a reservation

    cdef int _check_open(self) except -1
    cdef int _check_unviewed(self) except -1
    cdef object _array(self, object dtype, object shape, uint64_t offset)


cdef class Reservation(Held):
    cdef void _abort(self) noexcept


cdef class Record(Held):
    cdef readonly uint32_t type
    cdef readonly uint32_t flags

    cdef void _release(self) noexcept
