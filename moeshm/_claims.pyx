"""What calls have of a slab, on the engine's side: room for their arrays, a slot of flags, and the
descriptor that tells the worker of both.

transport/slab.py and descriptors.py say where things are. All of this is on every call's way.
"""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ._atomics cimport moeshm_load_word, moeshm_replace_word, moeshm_store_word
from ._descriptors cimport ALIGNMENT, SLOTS, VERSION, Descriptor

from ._words import wait_for_word
from .transport.slab import Places

cdef enum:
    # As transport/slab.py has them.
    SLOT_BYTES = 512
    GIVEN = 0
    DONE = 128
    REFUSED = 256
    TAKEN = 384
    # Of ids in the slab, int32, and of weights, float32.
    PAIR_BYTES = 4

# Sequences do not wrap, as waits of HIP's streams compare plain numbers. Past the first of these
# they begin anew as soon as nothing is claimed; flags of claims of before stay reached. Past the
# last nothing is claimed until then: an abandoned call's `done` is one more.
cdef uint32_t RESTART = 3 << 30
cdef uint32_t LAST = 0xFFFFFFFE


# Bytes of a call's hidden states, or output, and of its ids, or weights.
cdef struct Sizes:
    uint64_t rows
    uint64_t pairs


def sizes(uint32_t n_tokens, uint32_t hidden_size, uint16_t top_k, uint8_t dtype):
    """Bytes of a call's arrays, in the order of `Places`. `dtype`: its code."""
    cdef Sizes each = sizes_of(n_tokens, hidden_size, top_k, dtype)
    return each.rows, each.pairs, each.pairs, each.rows


@cython.final
cdef class _Flags:
    """A slab's flags, mapped for as long as its allocator or a claim may look at them."""

    cdef Py_buffer view
    cdef object memory

    def __cinit__(self, memory):
        self.memory = memory
        PyObject_GetBuffer(memory, &self.view, PyBUF_WRITABLE)
        if self.view.len < SLOTS * SLOT_BYTES:
            raise ValueError(f"a segment of {self.view.len} bytes; pass one of a slab, whose flags "
                             f"alone take {SLOTS * SLOT_BYTES}")

    def __dealloc__(self):
        PyBuffer_Release(&self.view)


@cython.final
@cython.no_gc
@cython.freelist(32)
cdef class Claim:
    """What one call has of a slab until its output was taken; made by `Allocator.claim`.

    `which`: the place of a flag in its slot, as transport/slab.py names them; IndexError for what
    is no flag's.
    """

    cdef _Flags flags
    cdef char *slot
    cdef Descriptor descriptor
    # Of `Places`.
    cdef readonly object places

    @property
    def sequence(self):
        """What its flags are set to."""
        return self.descriptor.sequence

    @property
    def out_bytes(self):
        """Of the output, and of hidden states."""
        return self._sizes().rows

    @property
    def given_bytes(self):
        """Of hidden states, ids and weights."""
        cdef Sizes each = self._sizes()
        return each.rows + 2 * each.pairs

    def describe(self, uint64_t call_id, uint32_t layer, double deadline, uint32_t view,
                 bint are_global):
        """The record that tells the worker of it. `deadline`: of time.monotonic, in seconds."""
        cdef Descriptor *it = &self.descriptor
        it.call_id = call_id
        it.layer = layer
        it.deadline_ns = <int64_t>(deadline * 1e9)
        it.view = view
        it.id_space = are_global
        return (<char *>it)[:sizeof(Descriptor)]

    def flag(self, uint32_t which):
        """Where that flag of it is in the segment."""
        return <char *>self._word(which) - <char *>self.flags.view.buf

    def has_reached(self, uint32_t which):
        """True once that flag was set for it."""
        return <int32_t>(moeshm_load_word(self._word(which)) - self.descriptor.sequence) >= 0

    def wait(self, which, timeout_ns, spin_ns):
        """`has_reached`, waited for as by `wait_for_word`."""
        return wait_for_word(
            self.flags.memory, self.flag(which), self.sequence, timeout_ns, spin_ns)

    def set(self, uint32_t which, uint32_t value):
        """Set that flag, by the host."""
        moeshm_store_word(self._word(which), value)

    def abandon(self):
        """Let whoever waits for `done` go on, and be able to tell when the worker has set it, if it
        has not: it is one more than the sequence until then."""
        cdef uint32_t *done = self._word(DONE)
        cdef uint32_t seen = moeshm_load_word(done)
        if <int32_t>(seen - self.descriptor.sequence) < 0:
            # A worker that comes in between has passed it, and says so once only.
            moeshm_replace_word(done, seen, self.descriptor.sequence + 1)

    def abandon_taken(self):
        """Set `taken`, which is reached, to what `done` is after `abandon`: so far a worker that
        ends waits for it to come."""
        moeshm_store_word(self._word(TAKEN), self.descriptor.sequence + 1)

    @property
    def is_passed(self):
        """True once `done` was set to the sequence itself, as the worker does."""
        return moeshm_load_word(self._word(DONE)) == self.descriptor.sequence

    @property
    def refused(self):
        """That flag."""
        return moeshm_load_word(self._word(REFUSED))

    cdef Sizes _sizes(self) noexcept:
        cdef Descriptor *it = &self.descriptor
        return sizes_of(it.n_tokens, it.hidden_size, it.top_k, it.dtype)

    cdef uint32_t *_word(self, uint32_t which) except NULL:
        # Python code can make a claim of nothing.
        if which % 4 or which >= SLOT_BYTES or self.slot is NULL:
            raise IndexError(f"no flag at {which} of a slot; there are GIVEN, DONE, REFUSED, TAKEN")
        return <uint32_t *>(self.slot + which)


@cython.final
cdef class Allocator:
    """Gives calls parts of a slab's data, one behind the other, and takes them back in that order.

    One thread at a time. `memory`: the slab's segment; `data_bytes`: of the slab, in the segment or
    not; `last_sequence`: where numbers go on from. ValueError: there is no room for flags, or data,
    or no number.
    """

    cdef _Flags flags
    cdef uint64_t data_bytes
    cdef uint32_t sequence
    cdef unsigned n_claims
    # By slot, where the part of the data ends that is claimed with it, counted without wrapping.
    cdef uint64_t ends[SLOTS]
    # Bytes given out and taken back since the slab was empty, the rests of laps included.
    cdef uint64_t end, begin

    def __init__(self, memory, uint64_t data_bytes, uint32_t last_sequence=0):
        if not data_bytes:
            raise ValueError("a slab of 0 bytes; pass the size of its data")
        if last_sequence >= LAST:
            raise ValueError(f"last_sequence={last_sequence}; pass a number below {LAST}")
        self.flags = _Flags(memory)
        self.data_bytes = data_bytes
        self.sequence = last_sequence

    def most_tokens(self, uint32_t hidden_size, uint16_t top_k, uint8_t dtype):
        """That one call can have; 0 where not even one has room. `dtype`: its code."""
        cdef Sizes each = sizes_of(1, hidden_size, top_k, dtype)
        cdef uint64_t per_token = 2 * (each.rows + each.pairs)
        # Each of the four arrays is padded.
        cdef uint64_t padding = 4 * ALIGNMENT
        if not per_token or self.data_bytes <= padding:
            return 0
        return (self.data_bytes - padding) // per_token

    def claim(self, uint32_t n_tokens, uint32_t hidden_size, uint16_t top_k, uint8_t dtype):
        """Room for the arrays of such a call, whose flag `refused` is 0 then; None while there is
        none, and after `close`."""
        cdef Sizes each = sizes_of(n_tokens, hidden_size, top_k, dtype)
        cdef uint64_t rows = padded(each.rows), pairs = padded(each.pairs)
        cdef uint64_t size = 2 * (rows + pairs), begin, at
        if not self.n_claims:
            # Memory used last is in caches, and in translation buffers.
            self.begin = self.end = 0
        begin, at = self.end, self.end % self.data_bytes
        if at + size > self.data_bytes:
            # In one piece: the rest of the lap stays unused.
            begin, at = begin + (self.data_bytes - at) % self.data_bytes, 0
        if (self.n_claims == SLOTS or begin + size - self.begin > self.data_bytes
                or self.sequence == LAST or self.flags is None):
            return None
        claim = new_claim(self.flags, self.sequence % SLOTS)
        self.sequence += 1
        self.n_claims += 1
        self.end = self.ends[claim.descriptor.slot] = begin + size
        cdef Descriptor *it = &claim.descriptor
        it.sequence = self.sequence
        it.n_tokens = n_tokens
        it.hidden_size = hidden_size
        it.top_k = top_k
        it.dtype = dtype
        it.hidden_states = at
        it.topk_ids = at + rows
        it.topk_weights = it.topk_ids + pairs
        it.out = it.topk_weights + pairs
        # What Places(...) would make, by way of Python.
        claim.places = tuple.__new__(
            Places, (it.slot, it.hidden_states, it.topk_ids, it.topk_weights, it.out))
        return claim

    def free_oldest(self):
        """Nothing uses the oldest claim any more. IndexError: there is none."""
        if not self.n_claims:
            raise IndexError("nothing is claimed; free what was")
        self.begin = self.ends[(self.sequence - self.n_claims) % SLOTS]
        self.n_claims -= 1
        if not self.n_claims and self.sequence >= RESTART and self.flags is not None:
            self._restart()

    cdef _restart(self):
        """Have sequences, and flags, which nobody sets or waits for, begin as in a new slab."""
        cdef char *slot = <char *>self.flags.view.buf
        cdef int _number
        for _number in range(SLOTS):
            moeshm_store_word(<uint32_t *>(slot + GIVEN), 0)
            moeshm_store_word(<uint32_t *>(slot + DONE), 0)
            moeshm_store_word(<uint32_t *>(slot + TAKEN), 0)
            slot += SLOT_BYTES
        self.sequence = 0

    def close(self):
        """Give out no more; flags stay mapped for claims that there are."""
        self.flags = None


cdef Claim new_claim(_Flags flags, uint32_t slot):
    cdef Claim claim = Claim.__new__(Claim)
    claim.flags = flags
    claim.slot = <char *>flags.view.buf + slot * SLOT_BYTES
    claim.descriptor.version = VERSION
    claim.descriptor.length = sizeof(Descriptor)
    claim.descriptor.slot = slot
    moeshm_store_word(<uint32_t *>(claim.slot + REFUSED), 0)
    return claim


cdef inline Sizes sizes_of(
        uint64_t n_tokens, uint64_t hidden_size, uint64_t top_k, uint8_t dtype) noexcept:
    cdef Sizes each
    each.rows = n_tokens * hidden_size * (2 if dtype else 4)
    each.pairs = n_tokens * top_k * PAIR_BYTES
    return each


cdef inline uint64_t padded(uint64_t n_bytes) noexcept:
    return (n_bytes + ALIGNMENT - 1) & ~<uint64_t>(ALIGNMENT - 1)
