cimport numpy as cnp
from libc.stdint cimport int64_t

ctypedef void (*Loop)(const void *source, void *target, size_t count) noexcept nogil

# From one format to another (by their NumPy types), or NULL.
cdef Loop find_conversion(int source, int target) noexcept

# The data of int64 [n_rows] whose values are in 0..n_tokens-1; TypeError, ValueError, IndexError.
cdef int64_t *checked_rows(cnp.ndarray rows, Py_ssize_t n_rows, Py_ssize_t n_tokens) except? NULL
