"""Words of 32 bits in shared memory that devices and processes set for one another."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t, uint32_t
from posix.time cimport nanosleep, timespec

from ._atomics cimport moeshm_load_word, moeshm_now_ns, moeshm_pause, moeshm_store_word

cdef enum:
    # Looks at a word between two looks at the clock.
    LOOKS = 64
    # How long a waiting thread sleeps between looks, once it does not spin any more.
    NAP_NS = 50_000


cdef uint32_t *_word(memory, Py_ssize_t offset, int flags, Py_buffer *view) except NULL:
    PyObject_GetBuffer(memory, view, flags)
    if offset < 0 or offset % 4 or offset + 4 > view.len:
        PyBuffer_Release(view)
        raise IndexError(f"offset {offset} in {view.len} bytes is no word's; pass a multiple of 4 "
                         "below that")
    return <uint32_t *>(<char *>view.buf + offset)


def load_word(memory, Py_ssize_t offset):
    """The word there; what was written before it was set can be read after this."""
    cdef Py_buffer view
    cdef uint32_t value = moeshm_load_word(_word(memory, offset, PyBUF_SIMPLE, &view))
    PyBuffer_Release(&view)
    return value


def store_word(memory, Py_ssize_t offset, uint32_t value):
    """Set it; whoever sees that can read what was written before."""
    cdef Py_buffer view
    moeshm_store_word(_word(memory, offset, PyBUF_WRITABLE, &view), value)
    PyBuffer_Release(&view)


def wait_for_word(memory, Py_ssize_t offset, uint32_t value, int64_t timeout_ns, int64_t spin_ns):
    """Wait until the word has reached `value`, as numbers that wrap; False at the timeout.

    Looks all the time for `spin_ns`, then between short sleeps: nobody wakes a thread when a GPU
    writes. Without the GIL.
    """
    cdef Py_buffer view
    cdef uint32_t *word = _word(memory, offset, PyBUF_SIMPLE, &view)
    cdef bint has_come
    with nogil:
        has_come = _wait(word, value, timeout_ns, spin_ns)
    PyBuffer_Release(&view)
    return has_come


cdef bint _wait(const uint32_t *word, uint32_t value, int64_t timeout_ns,
                int64_t spin_ns) noexcept nogil:
    cdef int64_t start_ns = moeshm_now_ns(), elapsed_ns = 0
    cdef timespec nap
    cdef int _look
    nap.tv_sec = 0
    nap.tv_nsec = NAP_NS
    while True:
        for _look in range(LOOKS):
            if <int32_t>(moeshm_load_word(word) - value) >= 0:
                return True
            moeshm_pause()
        elapsed_ns = moeshm_now_ns() - start_ns
        if elapsed_ns >= timeout_ns:
            return False
        if elapsed_ns >= spin_ns:
            nanosleep(&nap, NULL)
