from libc.stdint cimport uint64_t

cdef enum:
    PAGE = 4096

cdef class Mapping:
    cdef char *control          # one page, writable by both ends
    cdef char *data             # `area` bytes, twice in a row
    cdef readonly uint64_t area
    cdef char *_base
    cdef uint64_t _length
