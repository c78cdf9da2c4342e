"""Plain descriptors out of a ring, read and checked in one step.

`descriptors.py` says what the bytes mean and is the only one to judge them: whatever is not plain
here is left to it.
"""

from libc.stdint cimport uint64_t
from libc.string cimport memcpy

from ._ring cimport Record


def read_plain_descriptor(Record record not None, tuple known not None, uint64_t max_tokens,
                          uint64_t data_bytes):
    """`(layer, n_tokens, hidden_size, top_k, dtype code, places, sequence, n_ids, slots, call_id,
    deadline_ns)` of a descriptor that is right in everything; None for any other.

    `known`: for local and for global ids, by `view << 32 | layer`, `(hidden_size, top_k, n_ids,
    slots)`, of which the last two come back as they are. `places`: a slot, and the offsets of
    hidden states, ids, weights and output. `data_bytes`: the slab's.
    """
    cdef Descriptor it
    cdef uint64_t hidden_size, top_k, n_bytes, n_pair_bytes
    if record.type != DESCRIPTOR or record.size != sizeof(Descriptor):
        return None
    # Copied before it is checked: the client could change it in between.
    memcpy(&it, record.payload, sizeof(Descriptor))
    if (it.version != VERSION or it.length != sizeof(Descriptor) or it.id_space > 1
            or it.dtype > 2 or it.slot >= SLOTS):
        return None
    layer = (<dict?>known[it.id_space]).get(<uint64_t>it.view << 32 | it.layer)
    if layer is None:
        return None
    hidden_size, top_k, n_ids, slots = layer
    if (it.hidden_size != hidden_size or not 1 <= it.top_k <= top_k
            or not 1 <= it.n_tokens <= max_tokens):
        return None
    n_bytes = it.n_tokens * hidden_size * (2 if it.dtype else 4)
    n_pair_bytes = <uint64_t>it.n_tokens * it.top_k * 4
    if not (is_inside(it.hidden_states, n_bytes, data_bytes)
            and is_inside(it.topk_ids, n_pair_bytes, data_bytes)
            and is_inside(it.topk_weights, n_pair_bytes, data_bytes)
            and is_inside(it.out, n_bytes, data_bytes)):
        return None
    return (
        it.layer,
        it.n_tokens,
        hidden_size,
        it.top_k,
        it.dtype,
        (it.slot, it.hidden_states, it.topk_ids, it.topk_weights, it.out),
        it.sequence,
        n_ids,
        slots,
        it.call_id,
        it.deadline_ns,
    )


cdef inline bint is_inside(uint64_t offset, uint64_t n_bytes, uint64_t data_bytes) noexcept:
    return offset % ALIGNMENT == 0 and offset <= data_bytes and n_bytes <= data_bytes - offset
