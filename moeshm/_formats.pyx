"""Conversions between the number formats, and sums over rows, in one pass over memory each."""

cimport numpy as cnp
from libc.stdint cimport int64_t
from libc.string cimport memcpy

cnp.import_array()

cdef extern from "_formats.h" nogil:
    void moeshm_widen_f16(const void *source, void *target, size_t count)
    void moeshm_widen_bf16(const void *source, void *target, size_t count)
    void moeshm_narrow_f16(const void *source, void *target, size_t count)
    void moeshm_narrow_bf16(const void *source, void *target, size_t count)
    void moeshm_f16_to_bf16(const void *source, void *target, size_t count)
    void moeshm_bf16_to_f16(const void *source, void *target, size_t count)
    void moeshm_add_f32(const void *source, void *target, size_t count)
    void moeshm_add_f16(const void *source, void *target, size_t count)
    void moeshm_add_bf16(const void *source, void *target, size_t count)

# Fewer bytes than this are done before another thread would have taken the interpreter.
cdef Py_ssize_t NOGIL_BYTES = 64 << 10


cdef void copy_f32(const void *source, void *target, size_t count) noexcept nogil:
    memcpy(target, source, count * 4)


cdef void copy_16(const void *source, void *target, size_t count) noexcept nogil:
    memcpy(target, source, count * 2)


cdef Loop find_conversion(int source, int target) noexcept:
    if not (is_format(source) and is_format(target)):
        return NULL
    if source == target:
        if source == cnp.NPY_FLOAT32:
            return copy_f32
        return copy_16
    if target == cnp.NPY_FLOAT32:
        if source == cnp.NPY_FLOAT16:
            return moeshm_widen_f16
        return moeshm_widen_bf16
    if source == cnp.NPY_FLOAT32:
        if target == cnp.NPY_FLOAT16:
            return moeshm_narrow_f16
        return moeshm_narrow_bf16
    if source == cnp.NPY_FLOAT16:
        return moeshm_f16_to_bf16
    return moeshm_bf16_to_f16


cdef Loop find_addition(int source) noexcept:
    if source == cnp.NPY_FLOAT32:
        return moeshm_add_f32
    if source == cnp.NPY_FLOAT16:
        return moeshm_add_f16
    if source == cnp.NPY_UINT16:
        return moeshm_add_bf16
    return NULL


cdef bint is_format(int kind) noexcept:
    return kind == cnp.NPY_FLOAT32 or kind == cnp.NPY_FLOAT16 or kind == cnp.NPY_UINT16


def convert(cnp.ndarray source not None, cnp.ndarray target not None):
    """Fill `target` with the values of `source`, of the same shape.

    Both C-contiguous float32, float16 or bfloat16 as uint16. Rounds to nearest, ties to even; NaN
    stays NaN. TypeError, ValueError.
    """
    cdef int source_kind = cnp.PyArray_TYPE(source), target_kind = cnp.PyArray_TYPE(target)
    cdef Loop loop = find_conversion(source_kind, target_kind)
    if loop is NULL or not (cnp.PyArray_ISCARRAY_RO(source) and cnp.PyArray_ISCARRAY(target)):
        raise TypeError(f"from {source.dtype} to {target.dtype}; pass contiguous float formats")
    if not cnp.PyArray_SAMESHAPE(source, target):
        raise ValueError("source and target have different shapes")
    cdef const void *at = cnp.PyArray_DATA(source)
    cdef void *into = cnp.PyArray_DATA(target)
    cdef size_t count = cnp.PyArray_SIZE(source)
    if cnp.PyArray_NBYTES(source) >= NOGIL_BYTES:
        with nogil:
            loop(at, into, count)
    else:
        loop(at, into, count)


def add_rows(cnp.ndarray total not None, rows, cnp.ndarray part not None):
    """Add row `i` of `part` to row `rows[i]` of `total`, or to row `i` where `rows` is None.

    `total`: float32 [n_tokens, width]; `part`: [n_rows, width] of any of the three formats;
    `rows`: int64 [n_rows], each in range. All C-contiguous. TypeError, ValueError, IndexError:
    nothing was added.
    """
    cdef Loop loop = find_addition(cnp.PyArray_TYPE(part))
    if (loop is NULL or cnp.PyArray_TYPE(total) != cnp.NPY_FLOAT32
            or not (cnp.PyArray_ISCARRAY(total) and cnp.PyArray_ISCARRAY_RO(part))
            or cnp.PyArray_NDIM(total) != 2 or cnp.PyArray_NDIM(part) != 2):
        raise TypeError(
            f"add {part.dtype} to {total.dtype}; pass contiguous arrays of two dimensions, "
            "the total in float32"
        )
    cdef Py_ssize_t n_rows = cnp.PyArray_DIM(part, 0), width = cnp.PyArray_DIM(part, 1), i
    cdef Py_ssize_t n_tokens = cnp.PyArray_DIM(total, 0)
    cdef char *into = <char *>cnp.PyArray_DATA(total)
    cdef const char *at = <const char *>cnp.PyArray_DATA(part)
    cdef Py_ssize_t step = width * cnp.PyArray_ITEMSIZE(part)
    cdef int64_t *index = NULL
    if cnp.PyArray_DIM(total, 1) != width:
        raise ValueError(f"rows of {width} values cannot be added to rows of {total.shape[1]}")
    if rows is not None:
        index = checked_rows(rows, n_rows, n_tokens)
    elif n_rows != n_tokens:
        raise ValueError(f"{n_rows} rows for {n_tokens} tokens; say which (rows)")
    if n_rows * step < NOGIL_BYTES:
        for i in range(n_rows):
            loop(at + i * step, into + (index[i] if index else i) * width * 4, width)
        return
    with nogil:
        for i in range(n_rows):
            loop(at + i * step, into + (index[i] if index else i) * width * 4, width)


cdef int64_t *checked_rows(cnp.ndarray rows, Py_ssize_t n_rows, Py_ssize_t n_tokens) except? NULL:
    if (cnp.PyArray_TYPE(rows) != cnp.NPY_INT64 or cnp.PyArray_NDIM(rows) != 1
            or not cnp.PyArray_ISCARRAY_RO(rows)):
        raise TypeError("rows must be a contiguous int64 array of one dimension")
    if cnp.PyArray_DIM(rows, 0) != n_rows:
        raise ValueError(f"{cnp.PyArray_DIM(rows, 0)} row numbers for {n_rows} rows")
    cdef int64_t *index = <int64_t *>cnp.PyArray_DATA(rows)
    cdef Py_ssize_t i
    for i in range(n_rows):
        if index[i] < 0 or index[i] >= n_tokens:
            raise IndexError(f"row {index[i]} of {n_tokens}")
    return index
