"""Commands for kernels that stay on a GPU, in memory that the host and the device share.

The layout is `Mailbox` of kernels/resident.cu. The device looks for a command by its number, which
lies beside each word of it, so that one look of the device says whether all of it is there.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int16_t, int32_t, uint32_t, uint64_t
from libc.string cimport memset

from moeshm._atomics cimport moeshm_exchange, moeshm_load_word, moeshm_store_release

cdef enum:
    COMMANDS = 16
    # Of 32 bits.
    WORDS = 128
    # Of `Command.number` in its words, and in its bytes of what it has of pairs.
    NUMBER_AT = 51
    EXPERTS_AT = 208
    PAIRS = 16
    WEIGHTS_AT = EXPERTS_AT + PAIRS * 8
    SLOTS_AT = WEIGHTS_AT + PAIRS * 4
    FINISHED_AT = COMMANDS * WORDS * 8
    ENDED_AT = FINISHED_AT + 128
    SPARE_AT = ENDED_AT + 128
    NBYTES = SPARE_AT + 128

#: Bytes of a mailbox.
MAILBOX_BYTES = NBYTES
#: Where it has the number of the last command whose work is done.
FINISHED = FINISHED_AT
#: Where it has that of the last kernel that takes no more commands.
ENDED = ENDED_AT


def set_pairs(uint64_t address, ids, weights, addresses):
    """Put a single token's pairs into the `abi.Command` at that address: ids, int32 slots of the
    layer or -1; weights, float32; and where experts are, of uint64 `addresses` by slot.

    IndexError: more than 16 pairs, or a slot that `addresses` has not; then nothing is set.
    """
    cdef const int32_t[::1] slots = ids.reshape(-1)
    cdef const float[::1] floats = weights.reshape(-1)
    cdef const uint64_t[::1] experts = addresses
    cdef Py_ssize_t n = slots.shape[0], index
    cdef char *command = <char *>address
    cdef int32_t slot
    if n > <int>PAIRS or floats.shape[0] != n:
        raise IndexError(f"{n} ids and {floats.shape[0]} weights; a command has room for 16 each")
    for index in range(n):
        if not -1 <= slots[index] < experts.shape[0]:
            raise IndexError(f"slot {slots[index]}; {experts.shape[0]} are known, -1 is an empty "
                             "one")
    for index in range(n):
        slot = slots[index]
        (<uint64_t *>(command + EXPERTS_AT))[index] = experts[slot] if slot >= 0 else 0
        (<float *>(command + WEIGHTS_AT))[index] = floats[index]
        (<int16_t *>(command + SLOTS_AT))[index] = <int16_t>slot


cdef class Mailbox:
    """Writable memory of MAILBOX_BYTES that starts at a multiple of 16, cleared by this.

    One thread at a time may use it. ValueError: there is less of it.
    """

    cdef Py_buffer view
    cdef char *memory
    cdef bint is_open
    cdef uint32_t n_posted

    def __init__(self, memory):
        if self.is_open:
            raise ValueError("a mailbox is made once")
        PyObject_GetBuffer(memory, &self.view, PyBUF_WRITABLE)
        self.is_open = True
        if self.view.len < NBYTES:
            raise ValueError(f"{self.view.len} bytes for a mailbox, which takes {NBYTES}")
        self.memory = <char *>self.view.buf
        memset(self.memory, 0, NBYTES)

    def __dealloc__(self):
        if self.is_open:
            PyBuffer_Release(&self.view)

    @property
    def n_posted(self):
        """The number of the last command; the first is 1, and they wrap at 2^32."""
        return self.n_posted

    @property
    def n_finished(self):
        """That of the last one whose work is done."""
        return moeshm_load_word(<uint32_t *>(self.memory + FINISHED_AT))

    @property
    def n_ended(self):
        """Of kernels, the last one that takes no more commands."""
        return moeshm_load_word(<uint32_t *>(self.memory + ENDED_AT))

    def post(self, uint64_t address):
        """Put the `abi.Command` at that address there, with its number, which is returned; None
        if commands that are not done take all the room, and nothing was put there.

        What it reads of `n_ended` from then on was so after the command could be seen.
        """
        cdef uint32_t number = self.n_posted + 1
        cdef const uint32_t *words = <const uint32_t *>address
        cdef uint64_t *to = <uint64_t *>(self.memory + number % COMMANDS * WORDS * 8)
        cdef uint32_t finished = moeshm_load_word(<uint32_t *>(self.memory + FINISHED_AT))
        cdef int index
        if <int32_t>(number - finished) > COMMANDS:
            return None
        for index in range(<int>WORDS):
            moeshm_store_release(
                to + index,
                (number if index == NUMBER_AT else words[index]) | <uint64_t>number << 32)
        self.n_posted = number
        # A full barrier: the device looks for the command after it has said that it ends.
        moeshm_exchange(<uint64_t *>(self.memory + SPARE_AT), 0)
        return number
