"""What one thread does at a time, taken and given back so that no signal comes in between.

A handler of a signal runs between two steps of the interpreter, and what it raises, most often a
KeyboardInterrupt, may leave a lock taken that `acquire()` and `try` were to guard. `with` and a
compiled `__enter__` are one step.
"""

from threading import Lock, get_ident
from time import monotonic

cimport cython

from .errors import RingFull


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

    def tried(self):
        """`with role.tried() as is_mine`: whether this thread has it now. Waits for nothing."""
        return _taking(self, 0)

    def taken(self, double deadline):
        """`with role.taken(deadline)`: waits for it. RingFull: others had it until then, of
        time.monotonic."""
        return _taking(self, deadline)


@cython.final
cdef class _Taking:
    cdef Role role
    cdef double deadline
    cdef bint is_mine

    def __enter__(self):
        cdef object lock = self.role.lock
        # Most often nobody has it, and to ask for it with a timeout takes much longer.
        self.is_mine = lock.acquire(False)
        if not self.is_mine and self.deadline:
            if not lock.acquire(True, max(0.0, self.deadline - monotonic())):
                raise RingFull("other threads' calls waited for room until this one's deadline")
            self.is_mine = True
        if self.is_mine:
            self.role.owner = get_ident()
        return self.is_mine

    def __exit__(self, kind, error, traceback):
        if self.is_mine:
            self.is_mine = False
            self.role.owner = 0
            self.role.lock.release()


cdef _Taking _taking(Role role, double deadline):
    cdef _Taking taking = _Taking.__new__(_Taking)
    taking.role = role
    taking.deadline = deadline
    return taking
