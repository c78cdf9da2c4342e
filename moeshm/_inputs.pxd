cimport numpy as cnp
from libc.stdint cimport int32_t

# How many rows of ids hold nothing but -1; `wrong` becomes the first id outside -1..limit-1.
cdef Py_ssize_t scan(cnp.ndarray ids, int32_t limit, int32_t *wrong) noexcept
