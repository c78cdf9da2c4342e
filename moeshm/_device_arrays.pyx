"""Looks at a call's arrays in a GPU's memory in one pass, by functions in C that their library has.

What is not plainly right here is left to `device_arrays`, which knows other ways to ask, and says
what is wrong.

Structures, numbers and promises are those of DLPack 1.3: include/dlpack/dlpack.h of
github.com/dmlc/dlpack, and "DLPack C Exchange API" of the Python array API standard.
"""

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

import sys

from .dtypes import DType

cnp.import_array()

cdef enum:
    MAJOR_VERSION = 1
    # What values are; bfloat16 is not among DLPack's floats.
    SIGNED = 0
    UNSIGNED = 1
    FLOAT = 2
    BFLOAT = 4
    # Flags of an array.
    READ_ONLY = 1
    COPIED = 2
    # As device_arrays has them.
    ALIGNMENT = 16
    ROW_VALUES = 8

cdef const char *CAPSULE = "dlpack_exchange_api"

# By their codes.
cdef tuple DTYPES = (DType.F32, DType.F16, DType.BF16)


cdef struct Version:
    uint32_t major
    uint32_t minor


cdef struct ValueType:
    uint8_t code
    uint8_t bits
    # Values that make one; more than 1 for vectors.
    uint16_t lanes


cdef struct Tensor:
    void *data
    int32_t device_type
    int32_t device_index
    int32_t n_dimensions
    ValueType dtype
    int64_t *shape
    # In values. NULL if contiguous, of libraries before 1.2.
    int64_t *strides
    uint64_t byte_offset


cdef struct ManagedTensor:
    Version version
    void *context
    void (*free)(ManagedTensor *) noexcept
    uint64_t flags
    Tensor tensor


cdef struct Exchange:
    Version version
    # Of an older version.
    void *previous
    void *_allocate
    # An array that keeps its memory until it is freed, and has flags.
    int (*export)(void *array, ManagedTensor **made) except? -1
    void *_import
    # An array for as long as nothing else happens. May be NULL.
    int (*look_at)(void *array, Tensor *found) except? -1
    int (*current_stream)(int32_t device_type, int32_t device_index, void **stream) except? -1


# What is known of an array that is contiguous, has two dimensions, and is on the GPU.
cdef struct Found:
    uintptr_t address
    int64_t n_rows
    int64_t n_columns
    uint8_t code
    uint8_t bits


# Of the type that was looked at last: most callers have one.
cdef object _last_type = None
cdef const Exchange *_last_exchange = NULL


def look(hidden_states, topk_ids, topk_weights, out, stream, int64_t hidden_size, int64_t top_k,
         int32_t device_type, int32_t device_index):
    """`(inputs, out_address, stream, is_current)` of a call, or None if anything may be wrong.

    `device_type`: DLPack's number for the vendor's GPUs. `inputs`: what DeviceInputs is made of, in
    its order. `out_address` is None if `out` is. `stream` is the handle; None if it is of another
    kind, or is to be the library's current one and that one is not known. `is_current`: it is that
    one, as far as a missing `out` makes this matter.
    """
    cdef Found hidden, ids, weights, output
    cdef const Exchange *exchange = NULL
    cdef int dtype, weights_dtype
    try:
        exchange = _exchange_of(hidden_states)
        if not (_locate(hidden_states, device_type, device_index, &hidden)
                and _locate(topk_ids, device_type, device_index, &ids)
                and _locate(topk_weights, device_type, device_index, &weights)):
            return None
        dtype, weights_dtype = _dtype_of(&hidden), _dtype_of(&weights)
        if (dtype < 0 or weights_dtype < 0 or not _are_right(&hidden, &ids, &weights, hidden_size,
                                                             top_k)):
            return None
        if out is not None and not (
                _locate_output(out, device_type, device_index, &output)
                and _dtype_of(&output) == dtype and output.n_rows == hidden.n_rows
                and output.n_columns == hidden_size and output.address % ALIGNMENT == 0):
            return None
        handle, is_current = _find_stream(stream, exchange, device_type, device_index, out is None)
    except Exception:
        # The library's, which Python's way of asking may or may not meet again.
        return None
    inputs = (
        hidden.address, ids.address, weights.address, hidden.n_rows, hidden_size, ids.n_columns,
        DTYPES[dtype], ids.bits // 8, DTYPES[weights_dtype],
        (hidden_states, topk_ids, topk_weights), device_index,
    )
    return inputs, None if out is None else output.address, handle, is_current


cdef bint _are_right(const Found *hidden, const Found *ids, const Found *weights,
                     int64_t hidden_size, int64_t top_k) noexcept:
    """Shapes, the ids' format, and where each begins."""
    return (
        hidden.n_columns == hidden_size and hidden_size % ROW_VALUES == 0
        and hidden.n_rows == ids.n_rows and 1 <= ids.n_columns <= top_k
        and ids.n_rows == weights.n_rows and ids.n_columns == weights.n_columns
        and ids.code == SIGNED and (ids.bits == 32 or ids.bits == 64)
        and hidden.address % ALIGNMENT == 0
        and ids.address % (ids.bits // 8) == 0
        and weights.address % (weights.bits // 8) == 0
    )


cdef int _dtype_of(const Found *found) noexcept:
    """DType's code, or -1."""
    if found.code == FLOAT and found.bits == 32:
        return 0
    if found.bits != 16:
        return -1
    if found.code == FLOAT:
        return 1
    # CuPy's are bit patterns; of others there are none here.
    return 2 if found.code == BFLOAT or found.code == UNSIGNED else -1


# --- arrays -------------------------------------------------------------------------------


cdef bint _locate(array, int32_t device_type, int32_t device_index, Found *found) except -1:
    """False: not plainly there."""
    cdef const Exchange *exchange = _exchange_of(array)
    cdef Tensor tensor
    if exchange is NULL:
        return _is_cupy(array) and _read_cupy(array, device_index, found)
    if exchange.look_at is NULL:
        return False
    return (exchange.look_at(<void *>array, &tensor) == 0
            and _read(array, &tensor, device_type, device_index, found))


cdef bint _locate_output(array, int32_t device_type, int32_t device_index,
                         Found *found) except -1:
    """As _locate, and False if it cannot be written, which a Tensor does not tell."""
    cdef const Exchange *exchange = _exchange_of(array)
    cdef ManagedTensor *made = NULL
    if exchange is NULL:
        return _locate(array, device_type, device_index, found)
    if exchange.export is NULL or exchange.export(<void *>array, &made) != 0 or made is NULL:
        return False
    try:
        return (made.version.major == MAJOR_VERSION and not made.flags & (READ_ONLY | COPIED)
                and _read(array, &made.tensor, device_type, device_index, found))
    finally:
        if made.free is not NULL:
            made.free(made)


cdef bint _read(array, const Tensor *tensor, int32_t device_type, int32_t device_index,
                Found *found) except -1:
    if (tensor.device_type != device_type or tensor.device_index != device_index
            or tensor.n_dimensions != 2 or tensor.shape is NULL or tensor.dtype.lanes != 1):
        return False
    if tensor.dtype.code == UNSIGNED and not _is_cupy(array):
        # Where there is bfloat16, these are numbers.
        return False
    found.address = <uintptr_t>tensor.data + tensor.byte_offset
    found.n_rows, found.n_columns = tensor.shape[0], tensor.shape[1]
    found.code, found.bits = tensor.dtype.code, tensor.dtype.bits
    return tensor.strides is NULL or _is_contiguous(found, tensor.strides[0], tensor.strides[1], 1)


cdef bint _is_contiguous(const Found *found, int64_t row_stride, int64_t stride,
                         int64_t value) noexcept:
    """In C order, by strides of which `value` is a value's; along a length of 1 any do."""
    if found.n_rows == 0 or found.n_columns == 0:
        return True
    return ((found.n_columns == 1 or stride == value)
            and (found.n_rows == 1 or row_stride == found.n_columns * value))


cdef bint _is_cupy(array) except -1:
    """CuPy is looked at only when the caller has imported it."""
    cupy = (<dict>sys.modules).get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


cdef bint _read_cupy(array, int32_t device_index, Found *found) except -1:
    """By attributes that cost little: CuPy makes `flags` and `device` whenever they are read."""
    memory = array.data
    cdef cnp.dtype dtype = array.dtype
    cdef tuple shape = array.shape, strides = array.strides
    if (memory.device_id != device_index or len(shape) != 2
            or not cnp.PyArray_ISNBO(dtype.byteorder)):
        return False
    if dtype.kind == c"f":
        found.code = FLOAT
    elif dtype.kind == c"i":
        found.code = SIGNED
    elif dtype.kind == c"u":
        found.code = UNSIGNED
    else:
        return False
    found.bits = <uint8_t>(8 * dtype.itemsize)
    found.address = memory.ptr
    found.n_rows, found.n_columns = shape[0], shape[1]
    return _is_contiguous(found, strides[0], strides[1], dtype.itemsize)


# --- libraries ----------------------------------------------------------------------------


cdef const Exchange *_exchange_of(array) except? NULL:
    """The functions of its library; NULL for none."""
    global _last_type, _last_exchange
    cdef const Exchange *exchange
    kind = type(array)
    if kind is _last_type:
        return _last_exchange
    exchange = _find_exchange(kind)
    # The two at once: what ends with the type before may come here.
    _last_exchange = exchange
    _last_type = kind
    return exchange


cdef const Exchange *_find_exchange(kind) except? NULL:
    # It stays where it is as long as the process lives.
    capsule = getattr(kind, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return NULL
    cdef const Exchange *exchange = <const Exchange *>PyCapsule_GetPointer(capsule, CAPSULE)
    return exchange if exchange.version.major == MAJOR_VERSION else NULL


# --- streams ------------------------------------------------------------------------------


cdef tuple _find_stream(stream, const Exchange *exchange, int32_t device_type,
                        int32_t device_index, bint must_compare):
    """`(handle, is_current)`, as of `look`."""
    cdef void *current = NULL
    cdef bint is_known = False
    if exchange is not NULL and exchange.current_stream is not NULL and (
            stream is None or must_compare):
        is_known = exchange.current_stream(device_type, device_index, &current) == 0
    if stream is None:
        return (<uintptr_t>current if is_known else None), True
    handle = _handle_of(stream, device_index)
    return handle, is_known and handle == <uintptr_t>current


cdef object _handle_of(stream, int32_t device_index):
    """None if it is not plainly of that GPU."""
    if type(stream) is int:
        handle = stream
    else:
        # torch's names.
        handle, index = getattr(stream, "cuda_stream", None), None
        if handle is not None:
            index = getattr(stream, "device_index", None)
        else:
            # And CuPy's, whose streams need not be of any.
            handle, index = getattr(stream, "ptr", None), getattr(stream, "device_id", None)
            index = device_index if index == -1 else index
        if index is None or index != device_index:
            return None
    return handle if type(handle) is int and handle >= 0 else None
