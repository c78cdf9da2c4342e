from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    PAGE = 4096
    ALIGNMENT = 64          # of records, and so of positions

# Places in the control page. Every word that changes has 128 bytes of its own: two cache lines,
# as CPUs prefetch them in pairs.
cdef enum:
    CREATOR = 64            # as in segment._CONTROL
    ATTACHER = 128
    PRODUCER_WORD = 256
    PRODUCER_STATE = 384
    CONSUMER_WORD = 512
    CONSUMER_STATE = 640

cdef enum Role:
    PRODUCER = 1
    CONSUMER = 2

# The beginning of the control page: written once, before anyone attaches.
cdef struct Control:
    uint64_t magic
    uint32_t version
    uint32_t creator_role
    uint64_t area
    uint64_t epoch
    uint64_t first_position

# Who is at an end: together they name a process for one boot.
cdef struct Identity:
    uint64_t pid
    uint64_t ticks


cdef class Mapping:
    cdef char *control          # one page, writable by both ends
    cdef char *data             # `area` bytes, twice in a row
    cdef readonly uint64_t area
    cdef Control header         # what the page says, as it was checked
    cdef bint _is_writable
    cdef char *_base
    cdef uint64_t _length

    cdef int _place(self, char *at, uint64_t size, int protection, int fd, long offset) except -1


cdef Mapping create_segment(int fd, Role role, uint64_t area, uint64_t epoch,
                            uint64_t first_position)
cdef Mapping attach_segment(int fd, Role role, object epoch)
