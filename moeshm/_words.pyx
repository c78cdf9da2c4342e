"""Words of 32 bits in shared memory that devices and processes set for one another."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t, uint32_t
from posix.time cimport nanosleep, timespec

from ._atomics cimport (
    MOESHM_GIVE_WAY_NS, moeshm_give_way, moeshm_load_word, moeshm_now_ns, moeshm_pause,
    moeshm_store_word,
)

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, ...)
    int PR_SET_TIMERSLACK
    int PR_GET_TIMERSLACK

cdef enum:
    # Looks at a word between two looks at the clock.
    LOOKS = 64
    # A thread that does not spin any more sleeps between looks for this part of what it has waited,
    # which is how late it may be, but not for less and not for longer than these.
    NAPS = 16
    SHORTEST_NAP_NS = 5_000
    LONGEST_NAP_NS = 200_000


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
    cdef int64_t start_ns = moeshm_now_ns()
    cdef int slack_ns
    cdef bint has_come
    if _look(word, value, start_ns, min(spin_ns, timeout_ns)):
        return True
    if spin_ns >= timeout_ns:
        return False
    # Else the kernel lets a thread sleep for 50 us longer than it asked for.
    slack_ns = prctl(PR_GET_TIMERSLACK)
    if slack_ns > 0:
        prctl(PR_SET_TIMERSLACK, <unsigned long>1)
    has_come = _doze(word, value, start_ns, timeout_ns)
    if slack_ns > 0:
        prctl(PR_SET_TIMERSLACK, <unsigned long>slack_ns)
    return has_come


cdef bint _look(const uint32_t *word, uint32_t value, int64_t start_ns,
                int64_t spin_ns) noexcept nogil:
    """Look at it again and again until it has come or the time is over."""
    cdef int64_t now_ns, give_way_at = start_ns + MOESHM_GIVE_WAY_NS
    cdef int _number
    while True:
        for _number in range(LOOKS):
            if _has_come(word, value):
                return True
            moeshm_pause()
        now_ns = moeshm_now_ns()
        if now_ns - start_ns >= spin_ns:
            return False
        if now_ns >= give_way_at:
            moeshm_give_way()
            give_way_at = now_ns + MOESHM_GIVE_WAY_NS


cdef bint _doze(const uint32_t *word, uint32_t value, int64_t start_ns,
                int64_t timeout_ns) noexcept nogil:
    """Look at it between sleeps until it has come or the time is over."""
    cdef int64_t elapsed_ns
    cdef timespec nap
    nap.tv_sec = 0
    while not _has_come(word, value):
        elapsed_ns = moeshm_now_ns() - start_ns
        if elapsed_ns >= timeout_ns:
            return False
        nap.tv_nsec = min(max(elapsed_ns // NAPS, SHORTEST_NAP_NS), LONGEST_NAP_NS)
        nanosleep(&nap, NULL)
    return True


cdef bint _has_come(const uint32_t *word, uint32_t value) noexcept nogil:
    return <int32_t>(moeshm_load_word(word) - value) >= 0
