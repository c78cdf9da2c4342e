"""Plain calls and replies over rings, in one compiled step each.

`protocol.py` says what the bytes mean and is the only one to judge them: whatever is not plain
here (a version, an id space, a status, any value that is not as it must be) is left to it. A call
of a few tokens takes less time than its Python would.
"""

cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

import numpy as np

from ._atomics cimport moeshm_copy
from ._formats cimport Loop, checked_rows, find_conversion
from ._inputs cimport scan
from ._mapping cimport Mapping
from ._ring cimport Record, Reservation, RingProducer

cnp.import_array()

cdef enum:
    CALL = 1
    REPLY = 2
    VERSION = 1
    HEADER_BYTES = 64

# Of a reply, in ns: the longest deadline that a call can have, choice.MAX_TIMEOUT_S.
MAX_COMPUTE_NS = 10**15
cdef uint64_t LONGEST_NS = MAX_COMPUTE_NS

# Copies from this size on let other Python threads run meanwhile.
cdef uint64_t NOGIL_BYTES = 64 << 10


cdef packed struct CallHeader:
    uint16_t version
    uint16_t header_bytes
    uint32_t layer
    uint64_t call_id
    int64_t deadline_ns
    uint32_t n_tokens
    uint32_t hidden_size
    uint16_t top_k
    uint8_t id_space
    uint8_t dtype
    uint8_t reply_dtype
    uint8_t zeros[3]
    uint32_t view
    uint8_t more_zeros[20]


cdef packed struct ReplyHeader:
    uint16_t version
    uint16_t status
    uint32_t n_tokens
    uint64_t call_id
    uint64_t compute_ns
    uint32_t hidden_size
    uint8_t dtype
    uint8_t zeros[35]


# float32, float16, and bfloat16 as uint16: by their codes on the wire.
cdef int[3] _TYPES = [cnp.NPY_FLOAT32, cnp.NPY_FLOAT16, cnp.NPY_UINT16]
cdef object _STORAGE = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.uint16))


cdef inline uint64_t rows_offset(uint64_t slots) noexcept:
    return (HEADER_BYTES + slots * 8 + 63) & ~<uint64_t>63


def write_call(RingProducer ring not None, uint64_t call_id, uint32_t layer,
               cnp.ndarray hidden_states not None, cnp.ndarray topk_ids not None,
               cnp.ndarray topk_weights not None, uint8_t dtype, int64_t deadline_ns,
               uint32_t view=0, cnp.ndarray rows=None):
    """Write a call of local ids into the ring, from contiguous arrays of checked shapes: of the
    tokens in `rows` (int64, None for all), their activations converted to `dtype` on the way.

    RingFull: no room now. Other errors as `RingProducer.write`.
    """
    cdef CallHeader *header
    cdef char *at
    cdef unsigned slot
    cdef Py_ssize_t n_tokens = cnp.PyArray_DIM(hidden_states, 0)
    cdef Py_ssize_t n_rows = n_tokens if rows is None else cnp.PyArray_DIM(rows, 0)
    cdef uint64_t hidden_size = cnp.PyArray_DIM(hidden_states, 1)
    cdef uint64_t top_k = cnp.PyArray_DIM(topk_ids, 1), slots = n_rows * top_k
    cdef uint64_t offset = rows_offset(slots)
    cdef uint64_t wire_bytes = hidden_size * (2 if dtype else 4), n_bytes = n_rows * wire_bytes
    cdef int kind = cnp.PyArray_TYPE(hidden_states), wire = _TYPES[dtype]
    cdef Loop convert = find_conversion(kind, wire)
    cdef int64_t *index = NULL
    cdef char *source = <char *>cnp.PyArray_DATA(hidden_states)
    cdef uint64_t row_bytes = hidden_size * cnp.PyArray_ITEMSIZE(hidden_states)
    cdef Mapping _alive = ring.mapping      # also after a close() by another thread
    if convert is NULL:
        raise TypeError(f"rows of {hidden_states.dtype} cannot travel as format {dtype}")
    if rows is not None:
        index = checked_rows(rows, n_rows, n_tokens)
    at = ring._begin(offset + n_bytes, CALL, 0, 0.0, &slot, NULL)
    header = <CallHeader *>at
    memset(header, 0, sizeof(CallHeader))
    header.version = VERSION
    header.header_bytes = HEADER_BYTES
    header.layer = layer
    header.call_id = call_id
    header.deadline_ns = deadline_ns
    header.n_tokens = n_rows
    header.hidden_size = hidden_size
    header.top_k = top_k
    header.dtype = header.reply_dtype = dtype
    header.view = view
    gather(at + HEADER_BYTES, <char *>cnp.PyArray_DATA(topk_ids), index, n_rows, top_k * 4)
    gather(at + HEADER_BYTES + slots * 4, <char *>cnp.PyArray_DATA(topk_weights), index, n_rows,
           top_k * 4)
    memset(at + HEADER_BYTES + slots * 8, 0, offset - HEADER_BYTES - slots * 8)
    if n_bytes < NOGIL_BYTES:
        pack(at + offset, wire_bytes, source, row_bytes, index, n_rows, hidden_size, convert,
             kind == wire)
    else:
        with nogil:
            pack(at + offset, wire_bytes, source, row_bytes, index, n_rows, hidden_size, convert,
                 kind == wire)
        ring._check_usable()
    ring._finish(slot)
    return offset + n_bytes


cdef void gather(char *into, const char *source, const int64_t *index, Py_ssize_t n_rows,
                 uint64_t row_bytes) noexcept nogil:
    cdef Py_ssize_t row
    if index is NULL:
        memcpy(into, source, n_rows * row_bytes)
        return
    for row in range(n_rows):
        memcpy(into + row * row_bytes, source + index[row] * row_bytes, row_bytes)


cdef void pack(char *into, uint64_t wire_bytes, const char *source, uint64_t row_bytes,
               const int64_t *index, Py_ssize_t n_rows, uint64_t hidden_size, Loop convert,
               bint is_plain) noexcept nogil:
    """Activations; those that need neither gathering nor converting in one copy, which knows what
    is best for its size."""
    cdef Py_ssize_t row
    if index is not NULL:
        for row in range(n_rows):
            convert(source + index[row] * row_bytes, into + row * wire_bytes, hidden_size)
    elif is_plain:
        moeshm_copy(into, source, n_rows * row_bytes)
    else:
        convert(source, into, n_rows * hidden_size)


def read_plain_call(Record record not None, dict shapes not None, uint64_t max_tokens):
    """`(call_id, layer, hidden_states, topk_ids, topk_weights, dtype code, deadline_ns)` of a call
    that is right in everything and has local ids; None for any other.

    `shapes`: by `view << 32 | layer`, `(hidden_size, top_k, number of local experts, table)`, the
    table being None or int32, local id to slot. `topk_ids` is a copy whose ids are in range, and
    slots; the other two are views of the record.
    """
    cdef CallHeader header
    cdef uint64_t slots, offset, hidden_size, top_k
    cdef int32_t wrong = -1, limit
    cdef cnp.ndarray ids
    if record.type != CALL or record.size < HEADER_BYTES:
        return None
    memcpy(&header, record.payload, sizeof(CallHeader))
    if (header.version != VERSION or header.header_bytes != HEADER_BYTES or header.id_space
            or header.dtype > 2 or header.reply_dtype > 2):
        return None
    shape = shapes.get(<uint64_t>header.view << 32 | header.layer)
    if shape is None:
        return None
    hidden_size, top_k, limit, table = shape
    if (header.hidden_size != hidden_size or not 1 <= header.top_k <= top_k
            or not 1 <= header.n_tokens <= max_tokens):
        return None
    slots = <uint64_t>header.n_tokens * header.top_k
    offset = rows_offset(slots)
    if record.size != offset + header.n_tokens * hidden_size * (2 if header.dtype else 4):
        return None
    cdef cnp.npy_intp dims[2]
    dims[0] = header.n_tokens
    dims[1] = header.top_k
    ids = cnp.PyArray_EMPTY(2, dims, cnp.NPY_INT32, 0)
    # Copied before they are checked: the client could change them in between.
    memcpy(cnp.PyArray_DATA(ids), record.payload + HEADER_BYTES, slots * 4)
    scan(ids, limit, &wrong)
    if wrong != -1:
        return None
    if table is not None:
        to_slots(<int32_t *>cnp.PyArray_DATA(ids), slots,
                 <int32_t *>cnp.PyArray_DATA(<cnp.ndarray?>table))
    return (
        header.call_id,
        header.layer,
        record._array(_STORAGE[header.dtype], (header.n_tokens, hidden_size), offset),
        ids,
        record._array(_STORAGE[0], (header.n_tokens, header.top_k), HEADER_BYTES + slots * 4),
        header.reply_dtype,
        header.deadline_ns,
    )


cdef inline void to_slots(int32_t *ids, uint64_t count, const int32_t *table) noexcept:
    cdef uint64_t index
    for index in range(count):
        if ids[index] >= 0:
            ids[index] = table[ids[index]]


def fill_reply(Reservation reply not None, uint64_t call_id, uint32_t n_tokens,
               uint32_t hidden_size, uint8_t dtype, uint64_t compute_ns):
    """Write the header of a reply whose rows are in place."""
    cdef ReplyHeader *header = <ReplyHeader *>reply.payload
    reply._check_open()
    if reply.size < HEADER_BYTES:
        raise ValueError(f"a reply of {reply.size} bytes; its header takes {HEADER_BYTES}")
    memset(header, 0, sizeof(ReplyHeader))
    header.version = VERSION
    header.n_tokens = n_tokens
    header.call_id = call_id
    header.compute_ns = compute_ns
    header.hidden_size = hidden_size
    header.dtype = dtype


def take_plain_reply(Record record not None, uint64_t call_id, cnp.ndarray into not None,
                     uint8_t dtype):
    """Copy the rows of the reply to `call_id` into a contiguous array, and return the worker's
    time in ns; -1, and nothing was copied, for a reply that is anything else."""
    cdef ReplyHeader header
    cdef uint64_t n_bytes = cnp.PyArray_NBYTES(into)
    if record.type != REPLY or record.size != HEADER_BYTES + n_bytes:
        return -1
    memcpy(&header, record.payload, sizeof(ReplyHeader))
    if (header.version != VERSION or header.status or header.call_id != call_id
            or header.dtype != dtype or header.compute_ns > LONGEST_NS
            or header.n_tokens != <uint64_t>cnp.PyArray_DIM(into, 0)
            or header.hidden_size != <uint64_t>cnp.PyArray_DIM(into, 1)):
        return -1
    cdef char *target = <char *>cnp.PyArray_DATA(into)
    if n_bytes >= NOGIL_BYTES:
        record.exports += 1
        with nogil:
            moeshm_copy(target, record.payload + HEADER_BYTES, n_bytes)
        record.exports -= 1
    else:
        memcpy(target, record.payload + HEADER_BYTES, n_bytes)
    return <int64_t>header.compute_ns
