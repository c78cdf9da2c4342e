"""What one thread does at a time, and waits of threads for each other, so that no signal comes in
between.

A handler of a signal runs between two steps of the interpreter, and what it raises, most often a
KeyboardInterrupt, may leave a lock taken that `acquire()` and `try` were to guard, or free one that
`threading.Condition.wait` gave away for a moment. `with` and a compiled `__enter__` are one step,
and so is a compiled wait, which has its lock again however it ends.
"""

from threading import TIMEOUT_MAX, Lock, get_ident, main_thread
from time import monotonic

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.math cimport INFINITY

from .errors import RingFull

# How long the main thread sleeps at a time, as handlers of signals run there. The system may give a
# signal to another thread, or to this one right before it sleeps: then nothing wakes it.
cdef double SLICE_S = 0.025


cdef bint _acquire(object lock, double deadline) except -1:
    """False at the deadline. What a signal's handler raises comes at most SLICE_S late."""
    cdef double left_s, slice_s
    # Most often nobody has it, and to ask for it with a timeout takes much longer.
    if lock.acquire(False):
        return True
    slice_s = SLICE_S if get_ident() == main_thread().ident else TIMEOUT_MAX
    while True:
        left_s = deadline - monotonic()
        if left_s <= 0:
            return False
        if lock.acquire(True, min(left_s, slice_s)):
            return True
        PyErr_CheckSignals()


@cython.final
cdef class Role:
    """A lock that says who has it."""

    cdef object lock
    # Of the thread, as of threading.get_ident; 0 for none.
    cdef readonly object owner

    def __cinit__(self):
        self.lock = Lock()
        self.owner = 0

    @property
    def is_taken(self):
        """By any thread."""
        return self.lock.locked()

    def tried(self, double deadline=0.0):
        """`with role.tried() as is_mine`: whether this thread has it now, or at the deadline, of
        time.monotonic."""
        return _taking(self, deadline, False)

    def taken(self, double deadline):
        """`with role.taken(deadline)`: waits for it. RingFull: others had it until then, of
        time.monotonic."""
        return _taking(self, deadline, True)


@cython.final
cdef class _Taking:
    cdef Role role
    cdef double deadline
    cdef bint is_mine
    cdef bint is_needed

    def __enter__(self):
        self.is_mine = _acquire(self.role.lock, self.deadline)
        if self.is_mine:
            self.role.owner = get_ident()
        elif self.is_needed:
            raise RingFull("other threads' calls waited for room until this one's deadline")
        return self.is_mine

    def __exit__(self, kind, error, traceback):
        if self.is_mine:
            self.is_mine = False
            self.role.owner = 0
            self.role.lock.release()


cdef _Taking _taking(Role role, double deadline, bint is_needed):
    cdef _Taking taking = _Taking.__new__(_Taking)
    taking.role = role
    taking.deadline = deadline
    taking.is_needed = is_needed
    return taking


@cython.final
cdef class Monitor:
    """A lock, and waiting for what others do under it: as threading.Condition."""

    cdef object lock
    # One for each thread that waits: locked until that is told.
    cdef list gates

    def __cinit__(self):
        self.lock = Lock()
        self.gates = []

    def __enter__(self):
        _acquire(self.lock, INFINITY)

    def __exit__(self, kind, error, traceback):
        self.lock.release()

    def wait(self, double timeout_s):
        """Until `notify_all`, or False at the timeout. The caller has the lock, and has it again
        when this ends, also by what a signal's handler raises; in between it is free."""
        cdef object gate = Lock()
        gate.acquire()
        self.gates.append(gate)
        self.lock.release()
        try:
            return _acquire(gate, monotonic() + timeout_s)
        finally:
            self._come_back(gate)

    def notify_all(self):
        """Let all that wait go on. The caller has the lock."""
        while self.gates:
            self.gates.pop().release()

    cdef int _come_back(self, object gate) except -1:
        cdef object raised = None
        while True:
            try:
                self.lock.acquire()
                break
            except BaseException as error:
                # By a signal's handler: later, as the lock must be had first.
                raised = error
        if gate in self.gates:
            self.gates.remove(gate)
        if raised is not None:
            raise raised
        return 0


@cython.final
cdef class Bell:
    """Wakes one thread: what was rung while it did not wait counts once. To ring it takes no lock,
    so that a finalizer may."""

    cdef object gate

    def __cinit__(self):
        self.gate = Lock()
        self.gate.acquire()

    def ring(self):
        """Let the thread that waits, or waits next, go on."""
        try:
            self.gate.release()
        except RuntimeError:
            pass  # it was rung already

    def wait(self, double timeout_s):
        """Until it is rung; False at the timeout."""
        return _acquire(self.gate, monotonic() + timeout_s)
