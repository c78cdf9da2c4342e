"""Maps a segment: its control page, then its data area twice back to back.

Behind the second copy of the data area nothing is mapped, and a record that starts in the first
copy may end in the second: no record ever wraps. The memory is unmapped when the last object
that points into it is gone, so a forgotten view can be stale but never a crash.
"""

from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_NONE,
    PROT_READ, PROT_WRITE, mmap, munmap,
)
from libc.errno cimport errno
from libc.stdint cimport uint64_t

import os

from .errors import SegmentError


cdef class Mapping:
    """`Mapping(fd, area, writable)`: the data area is read-only unless `writable`."""

    def __cinit__(self, int fd, uint64_t area, bint writable):
        cdef int protection = PROT_READ | PROT_WRITE if writable else PROT_READ
        cdef void *base
        self.area = area
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

    def __dealloc__(self):
        if self._base != NULL:
            munmap(self._base, self._length)


cdef object _failure(int code, uint64_t size):
    return SegmentError(
        code, f"mapping {size} bytes of shared memory failed ({os.strerror(code)}); "
        "ask for a smaller capacity or raise the address-space limit (ulimit -v)")
