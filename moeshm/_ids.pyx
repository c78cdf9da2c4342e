"""Looks over a call's expert ids in one pass: numpy would need several, each with its overhead."""

cimport cython
cimport numpy as cnp
from libc.stdint cimport int32_t

cnp.import_array()


@cython.boundscheck(False)
@cython.wraparound(False)
def inspect_ids(cnp.ndarray ids not None, int32_t limit):
    """What there is to know of `ids` [n_tokens, top_k] int32, C-contiguous.

    Returns `(n_empty_rows, wrong)`: how many rows hold nothing but -1, and the first id outside
    -1..limit-1, or None.
    """
    if (ids.ndim != 2 or cnp.PyArray_TYPE(ids) != cnp.NPY_INT32
            or not cnp.PyArray_IS_C_CONTIGUOUS(ids)):
        raise TypeError("ids must be a C-contiguous int32 array of two dimensions")
    cdef Py_ssize_t rows = ids.shape[0], columns = ids.shape[1], row, column, empty = 0
    cdef int32_t *at = <int32_t *>cnp.PyArray_DATA(ids)
    cdef int32_t found, used
    for row in range(rows):
        used = 0
        for column in range(columns):
            found = at[column]
            if found < -1 or found >= limit:
                return empty, found
            used |= found + 1
        empty += used == 0
        at += columns
    return empty, None
