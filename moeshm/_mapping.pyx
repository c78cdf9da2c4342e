"""What a ring's segment looks like: its control page, then its data area, mapped twice in a row.

A record that starts in the first copy of the data area may end in the second: no record ever
wraps. The memory is unmapped when the last object that points into it is gone, so a forgotten
view can be stale but never a crash.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_NONE,
    PROT_READ, PROT_WRITE, mmap, munmap,
)
from libc.errno cimport EBUSY, EINVAL, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

import os

from . import process
from ._atomics cimport moeshm_compare_exchange, moeshm_load_acquire, moeshm_store_release
from .errors import SegmentError

cdef uint64_t MAGIC = 0x00316D6873656F6D      # "moeshm1" and a zero, as bytes
cdef uint32_t ABI_VERSION = 1
cdef uint64_t MAX_AREA = (<uint64_t>1 << 39) + PAGE


cdef class Mapping:
    """`Mapping(fd, area, writable)`: the data area is read-only unless `writable`.

    A buffer: both copies of the data area, which stay mapped while a view of them is in use.
    """

    def __cinit__(self, int fd, uint64_t area, bint writable):
        cdef int protection = PROT_READ | PROT_WRITE if writable else PROT_READ
        cdef void *base
        self.area = area
        self._is_writable = writable
        self._length = PAGE + 2 * area
        # Reserve the whole range first, so that the three parts are sure to be neighbours.
        base = mmap(NULL, self._length, PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if base == MAP_FAILED:
            raise _failure(errno, self._length)
        self._base = <char *>base
        self._place(self._base, PAGE, PROT_READ | PROT_WRITE, fd, 0)
        self._place(self._base + PAGE, area, protection, fd, PAGE)
        self._place(self._base + PAGE + area, area, protection, fd, PAGE)
        self.control = self._base
        self.data = self._base + PAGE

    cdef int _place(self, char *at, uint64_t size, int protection, int fd, long offset) except -1:
        if mmap(at, size, protection, MAP_SHARED | MAP_FIXED, fd, offset) == MAP_FAILED:
            raise _failure(errno, size)
        return 0

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, 2 * self.area, not self._is_writable, flags)

    def __dealloc__(self):
        if self._base != NULL:
            munmap(self._base, self._length)


cdef object _failure(int code, uint64_t size):
    return SegmentError(
        code, f"mapping {size} bytes of shared memory failed ({os.strerror(code)}); "
        "ask for a smaller capacity or raise the address-space limit (ulimit -v)")


cdef Mapping create_segment(int fd, Role role, uint64_t area, uint64_t epoch,
                            uint64_t first_position):
    """Map a fresh segment of one page and `area` bytes, and write its control page."""
    cdef Mapping mapping = Mapping(fd, area, role == PRODUCER)
    cdef Control *control = <Control *>mapping.control
    control.version = ABI_VERSION
    control.creator_role = role
    control.area = area
    control.epoch = epoch
    control.first_position = first_position
    (<uint64_t *>(mapping.control + PRODUCER_WORD))[0] = first_position << 1
    (<uint64_t *>(mapping.control + CONSUMER_WORD))[0] = first_position << 1
    cdef Identity *creator = <Identity *>(mapping.control + CREATOR)
    pid, ticks = process.own_identity()
    creator.ticks = ticks
    moeshm_store_release(&creator.pid, pid)
    # Last: an attacher takes the segment for finished once it is there.
    moeshm_store_release(&control.magic, MAGIC)
    memcpy(&mapping.header, control, sizeof(Control))
    return mapping


cdef Mapping attach_segment(int fd, Role role, object epoch):
    """Map, check and sign a segment that another process made; SegmentError."""
    cdef uint64_t size = os.fstat(fd).st_size
    if size < 3 * PAGE or size % PAGE or size - PAGE > MAX_AREA:
        raise _refused(f"fd {fd} holds {size} bytes; no ring has that size")
    cdef Mapping mapping = Mapping(fd, size - PAGE, role == PRODUCER)
    if moeshm_load_acquire(<uint64_t *>mapping.control) != MAGIC:
        raise _refused(f"fd {fd} is no ring, or its creator has not finished it")
    # Copied before it is checked, and used from the copy: its creator can still change it.
    cdef Control *control = &mapping.header
    memcpy(control, mapping.control, sizeof(Control))
    cdef uint64_t capacity = size - 2 * PAGE
    if control.version != ABI_VERSION:
        raise _refused(f"the ring has version {control.version}, this moeshm {ABI_VERSION}; "
                       "install the same moeshm on both sides")
    if control.area != mapping.area or capacity & (capacity - 1):
        raise _refused(f"the ring says {control.area} bytes, its segment has {mapping.area}")
    if control.first_position % ALIGNMENT or control.first_position >> 63:
        raise _refused(f"the ring's positions start at {control.first_position}")
    if control.creator_role not in (PRODUCER, CONSUMER) or control.creator_role == role:
        raise _refused("the ring's creator has this end; attach the other one")
    if epoch is not None and epoch != control.epoch:
        raise _refused(f"the ring has epoch {control.epoch}; expected {epoch}")
    cdef Identity *attacher = <Identity *>(mapping.control + ATTACHER)
    pid, ticks = process.own_identity()
    if not moeshm_compare_exchange(&attacher.pid, 0, pid):
        raise SegmentError(EBUSY, f"process {attacher.pid} is attached to this ring already; "
                           "make a ring for each pair")
    moeshm_store_release(&attacher.ticks, ticks)
    return mapping


cdef object _refused(str why):
    return SegmentError(EINVAL, why)
