from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

# As descriptors.py and transport/slab.py have them.
cdef enum:
    DESCRIPTOR = 4
    VERSION = 1
    SLOTS = 32
    ALIGNMENT = 256


# The record, as descriptors.py describes it.
cdef packed struct Descriptor:
    uint16_t version
    uint16_t length
    uint32_t layer
    uint64_t call_id
    int64_t deadline_ns
    uint32_t n_tokens
    uint32_t hidden_size
    uint16_t top_k
    uint8_t id_space
    uint8_t dtype
    uint32_t view
    uint32_t slot
    uint32_t sequence
    uint64_t hidden_states
    uint64_t topk_ids
    uint64_t topk_weights
    uint64_t out
    uint8_t zeros[48]
