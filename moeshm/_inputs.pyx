"""Looks over a call's arrays in one pass: in Python and NumPy that costs more than the rest of a
small call, every attribute and every reduction having its price.
"""

cimport cython
cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport calloc, free

cnp.import_array()


def inspect_ids(cnp.ndarray ids not None, int32_t limit):
    """What there is to know of `ids` [n_tokens, top_k] int32, C-contiguous.

    Returns `(n_empty_rows, wrong)`: how many rows hold nothing but -1, and the first id outside
    -1..limit-1, or None.
    """
    if not is_plain(ids, cnp.NPY_INT32):
        raise TypeError("ids must be a C-contiguous int32 array of two dimensions")
    cdef int32_t wrong = -1
    cdef Py_ssize_t empty = scan(ids, limit, &wrong)
    return empty, None if wrong == -1 else wrong


def count_empty_rows(hidden_states, topk_ids, topk_weights, Py_ssize_t hidden_size,
                     Py_ssize_t top_k, int32_t limit):
    """How many rows of `topk_ids` hold nothing but -1, if the inputs can travel as they are.

    None when anything would have to be converted, or is wrong: `arrays.check` finds out what.
    """
    if not (type(hidden_states) is cnp.ndarray and type(topk_ids) is cnp.ndarray
            and type(topk_weights) is cnp.ndarray):
        return None
    cdef cnp.ndarray hidden = hidden_states, ids = topk_ids, weights = topk_weights
    cdef int stored = cnp.PyArray_TYPE(hidden)
    if stored != cnp.NPY_FLOAT32 and stored != cnp.NPY_FLOAT16 and stored != cnp.NPY_UINT16:
        return None
    if not (is_plain(hidden, stored) and is_plain(ids, cnp.NPY_INT32)
            and is_plain(weights, cnp.NPY_FLOAT32)):
        return None
    cdef Py_ssize_t n_tokens = cnp.PyArray_DIM(hidden, 0), columns = cnp.PyArray_DIM(ids, 1)
    if (cnp.PyArray_DIM(hidden, 1) != hidden_size or cnp.PyArray_DIM(ids, 0) != n_tokens
            or cnp.PyArray_DIM(weights, 0) != n_tokens or columns < 1 or columns > top_k
            or cnp.PyArray_DIM(weights, 1) != columns):
        return None
    cdef int32_t wrong = -1
    cdef Py_ssize_t empty = scan(ids, limit, &wrong)
    return empty if wrong == -1 else None


cdef bint is_plain(cnp.ndarray array, int kind) noexcept:
    """Two dimensions, C order, aligned, native."""
    return (cnp.PyArray_NDIM(array) == 2 and cnp.PyArray_TYPE(array) == kind
            and cnp.PyArray_ISCARRAY_RO(array))


@cython.boundscheck(False)
@cython.wraparound(False)
cdef Py_ssize_t scan(cnp.ndarray ids, int32_t limit, int32_t *wrong) noexcept:
    cdef Py_ssize_t rows = cnp.PyArray_DIM(ids, 0), columns = cnp.PyArray_DIM(ids, 1)
    cdef Py_ssize_t column, empty = 0
    cdef int32_t *at = <int32_t *>cnp.PyArray_DATA(ids)
    cdef int32_t *end = at + rows * columns
    cdef int32_t used
    while at < end:
        used = 0
        for column in range(columns):
            if at[column] < -1 or at[column] >= limit:
                wrong[0] = at[column]
                return empty
            used |= at[column] + 1
        empty += used == 0
        at += columns
    return empty


def used_rows(cnp.ndarray ids not None):
    """The rows of `ids` [n_tokens, top_k] int32, C-contiguous, that hold anything but -1: int64,
    rising."""
    if not is_plain(ids, cnp.NPY_INT32):
        raise TypeError("ids must be a C-contiguous int32 array of two dimensions")
    cdef Py_ssize_t rows = cnp.PyArray_DIM(ids, 0), columns = cnp.PyArray_DIM(ids, 1)
    cdef Py_ssize_t row, column, n_used = 0
    cdef int32_t *at = <int32_t *>cnp.PyArray_DATA(ids)
    cdef int32_t used
    cdef cnp.npy_intp dims[1]
    dims[0] = rows
    cdef cnp.ndarray found = cnp.PyArray_EMPTY(1, dims, cnp.NPY_INT64, 0)
    cdef int64_t *into = <int64_t *>cnp.PyArray_DATA(found)
    for row in range(rows):
        used = 0
        for column in range(columns):
            used |= at[column] + 1
        into[n_used] = row
        n_used += used != 0
        at += columns
    return found[:n_used]


def count_ids(cnp.ndarray ids not None, cnp.ndarray counts not None):
    """Add 1 to `counts` [num_experts] float64 for every id in `ids`, int32 or int64, C-contiguous.

    Negative ids are empty slots. Returns the first id that has no count, or None; those before it
    were counted.
    """
    cdef int kind = cnp.PyArray_TYPE(ids)
    if kind != cnp.NPY_INT32 and kind != cnp.NPY_INT64 or not cnp.PyArray_ISCARRAY_RO(ids):
        raise TypeError("ids must be a C-contiguous array of int32 or int64")
    if (cnp.PyArray_TYPE(counts) != cnp.NPY_FLOAT64 or counts.ndim != 1
            or not cnp.PyArray_ISCARRAY(counts)):
        raise TypeError("counts must be a writable float64 array of one dimension")
    cdef Py_ssize_t size = cnp.PyArray_SIZE(ids), index
    cdef int64_t limit = cnp.PyArray_DIM(counts, 0), found
    cdef double *count = <double *>cnp.PyArray_DATA(counts)
    cdef void *data = cnp.PyArray_DATA(ids)
    for index in range(size):
        if kind == cnp.NPY_INT32:
            found = (<int32_t *>data)[index]
        else:
            found = (<int64_t *>data)[index]
        if found >= limit:
            return found
        if found >= 0:
            count[found] += 1
    return None


def route(cnp.ndarray ids not None, cnp.ndarray table not None):
    """Look every id up: `(found, n_rows, n_slots, n_experts)`.

    `ids` [n_tokens, top_k] int32, C-contiguous, each in -1..len(table)-2; `table` int32, whose last
    entry is what -1 becomes. Of `found`, which is like `ids`: rows with any id that is not
    negative, such ids, and how many of them differ. IndexError: an id that the table lacks.
    """
    if not is_plain(ids, cnp.NPY_INT32):
        raise TypeError("ids must be a C-contiguous int32 array of two dimensions")
    if (cnp.PyArray_TYPE(table) != cnp.NPY_INT32 or cnp.PyArray_NDIM(table) != 1
            or not cnp.PyArray_ISCARRAY_RO(table) or cnp.PyArray_DIM(table, 0) < 1):
        raise TypeError("table must be a C-contiguous int32 array of one dimension")
    cdef Py_ssize_t last = cnp.PyArray_DIM(table, 0) - 1
    cdef Py_ssize_t rows = cnp.PyArray_DIM(ids, 0), columns = cnp.PyArray_DIM(ids, 1)
    cdef Py_ssize_t _row, column, n_rows = 0, n_slots = 0, n_experts = 0, before
    cdef cnp.ndarray found = cnp.PyArray_EMPTY(2, cnp.PyArray_DIMS(ids), cnp.NPY_INT32, 0)
    cdef int32_t *at = <int32_t *>cnp.PyArray_DATA(ids)
    cdef int32_t *into = <int32_t *>cnp.PyArray_DATA(found)
    cdef int32_t *values = <int32_t *>cnp.PyArray_DATA(table)
    cdef int32_t expert, value
    cdef char *is_used = <char *>calloc(last + 1, 1)
    if is_used is NULL:
        raise MemoryError()
    try:
        for _row in range(rows):
            before = n_slots
            for column in range(columns):
                expert = at[column]
                if expert < -1 or expert >= last:
                    raise IndexError(f"expert id {expert}; the table has 0..{last - 1}")
                value = values[last if expert < 0 else expert]
                into[column] = value
                if value >= 0:
                    n_slots += 1
                    if expert >= 0 and not is_used[expert]:
                        is_used[expert] = 1
                        n_experts += 1
            n_rows += n_slots > before
            at += columns
            into += columns
    finally:
        free(is_used)
    return found, n_rows, n_slots, n_experts
