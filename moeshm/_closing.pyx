"""Closing sockets in one step, which no signal and no other thread comes in between.

Each fd that Python closes lets another thread run, for 5 ms and more where that computes: a session
that is given up at a deadline has several, and its caller waits for them.
"""

from socket import SocketType

from posix.unistd cimport close


cdef extern from "<sys/socket.h>" nogil:
    int SHUT_RDWR
    int shutdown(int fd, int how)

# Of the C type: that of socket.socket is Python, in which an interrupt may lose the fd.
cdef object _detach = SocketType.detach


def close_socket(sock, bint is_over, int other=-1):
    """Close it, and another fd; again does nothing to the socket. `is_over`: for all who have it,
    and for threads that wait for it."""
    cdef int fd = _detach(sock)
    with nogil:
        if fd >= 0:
            if is_over:
                shutdown(fd, SHUT_RDWR)
            close(fd)
        if other >= 0:
            close(other)
