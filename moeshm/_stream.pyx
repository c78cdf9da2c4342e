"""What a stream sends and takes in, in steps that no signal comes in between.

A handler of a signal runs between two steps of the interpreter, and what it raises, most often a
KeyboardInterrupt, must not leave the two sides with different ideas of where a record ends. To move
bytes and to count them is one step here, and so is to hand a whole record over. In between there
are only waits: what was half sent or half there stays so, for whoever goes on.
"""

from collections import deque
from os import strerror
from socket import SocketType
from time import monotonic

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE, PyByteArray_Resize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EINTR, errno
from libc.math cimport INFINITY
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from ._ring cimport Header

from ._closing import close_socket
from ._role import Role
from .errors import Corrupt, MoeshmError, PeerDied, RingClosed, RingEmpty, RingError, RingFull

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT
    int MSG_NOSIGNAL
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    Py_ssize_t recv(int fd, void *into, size_t size, int flags)
    Py_ssize_t sendmsg(int fd, const msghdr *message, int flags)

cdef enum:
    MAX_PARTS = 8
    # Of a record in the inbox, beside its bytes.
    MESSAGE_BYTES = 256

# With a socket there is no memory that a limit could come from: of one record.
MAX_RECORD_BYTES = 256 << 20
# How long the other side may take nothing in the middle of a record.
STALL_S = 10.0
# System calls for so much let other Python threads run meanwhile.
cdef size_t NOGIL_BYTES = 64 << 10
# Of the C type, as in `_closing.pyx`.
cdef object _fileno = SocketType.fileno


cdef struct Leaving:
    # What is left of a record.
    iovec pieces[MAX_PARTS + 1]
    int first
    int count
    size_t n_left


cdef class StreamEnd:
    """One end of a stream, whose subclass waits:

    `_wait_for_room(deadline)`, until something may be sent, and `_wait_for_record(deadline)`, until
    `_read` has a record; False at that time, of time.monotonic. What these raise ends a write or an
    acquire and leaves the stream as it is, unless it is an error of the stream.

    `message` makes an empty bytearray for a record that comes, of which `describe` is told the
    type, the flags and the sequence.
    """

    cdef readonly object _socket
    # Who may take bytes in.
    cdef readonly object _reading
    # Whole records that nobody has, and their bytes.
    cdef readonly object _inbox
    cdef readonly uint64_t _inbox_bytes
    # As `Transport.finish_by`.
    cdef public object finish_by
    cdef object _make
    # Of what comes: what is there of a header, or of the message that it told of.
    cdef Header _header
    cdef object _message
    cdef size_t _filled
    cdef uint64_t _epoch
    cdef uint64_t _max_bytes
    cdef uint64_t _n_read
    # Of what leaves: records that have begun to, and the end of one whose sender was interrupted.
    cdef uint64_t _n_sent
    cdef bytes _rest
    cdef size_t _n_rest

    def __init__(self, sock, uint64_t epoch, uint64_t max_bytes, message):
        self._socket = sock
        self._reading = Role()
        self._inbox = deque()
        self._epoch = epoch
        self._max_bytes = max_bytes
        self._make = message

    @property
    def has_unread(self):
        """As `Transport.has_unread`."""
        return len(self._inbox) > 0

    @property
    def is_closed(self):
        """As `Transport.is_closed`."""
        return _fileno(self._socket) < 0

    def close(self):
        """As `Transport.close`."""
        close_socket(self._socket, True)

    def _gone(self):
        """Why nothing more comes or leaves."""
        if self.is_closed:
            return RingClosed("this end of the stream is closed")
        return PeerDied("the other end of the stream is gone, and all it sent was read")

    # --- receiving ----------------------------------------------------------------------

    def acquire(self, timeout_s=None):
        """As `Transport.acquire`."""
        cdef double deadline = _deadline(timeout_s)
        with self._reading.tried(deadline) as may_read:
            if not may_read:
                raise RingEmpty(f"another thread took records in for {timeout_s} s")
            if not self._inbox and not self._wait_for_record(deadline):
                raise RingEmpty(f"no record within {timeout_s} s")
            # From here on, nothing but C until the caller has it.
            message = self._inbox.popleft()
            self._inbox_bytes -= PyByteArray_GET_SIZE(message) + MESSAGE_BYTES
            return message

    def _read(self, double until):
        """Take in what has come, by who may read; True once a record more is in the inbox. False:
        not all of it is there, or it still comes in at that time, of time.monotonic.

        RingClosed, PeerDied: nothing more comes. Corrupt: what came cannot be.
        """
        if self._message is None:
            if not self._fill(<char *>&self._header, sizeof(Header), until):
                return False
            self._begin_message()
        cdef size_t size = PyByteArray_GET_SIZE(self._message)
        if not self._fill(PyByteArray_AS_STRING(self._message), size, until):
            return False
        self._inbox.append(self._message)
        self._inbox_bytes += size + MESSAGE_BYTES
        self._message = None
        self._filled = 0
        return True

    cdef int _begin_message(self) except -1:
        cdef Header *header = &self._header
        if (header.length > self._max_bytes or header.epoch != self._epoch
                or header.sequence != self._n_read):
            self.close()
            raise Corrupt(
                f"the other end of the stream sent record {header.sequence} of epoch "
                f"{header.epoch} with {header.length} bytes; expected record {self._n_read} of "
                f"epoch {self._epoch}, with at most {self._max_bytes}")
        message = self._make()
        try:
            # Not filled with zeros first.
            PyByteArray_Resize(message, header.length)
        except MemoryError:
            self.close()
            raise
        message.describe(header.type, header.flags, header.sequence)
        self._message = message
        self._n_read += 1
        self._filled = 0
        return 0

    cdef bint _fill(self, char *into, size_t size, double until) except -1:
        """Whether all of it is there."""
        cdef size_t received
        cdef bint is_long = size - self._filled >= NOGIL_BYTES
        while self._filled < size:
            received = self._receive(into + self._filled, size - self._filled, is_long)
            if not received:
                return False
            self._filled += received
            if self._filled < size:
                if monotonic() > until:
                    return False
                # However little comes at a time, others run meanwhile, and signals are seen.
                is_long = True
                PyErr_CheckSignals()
        return True

    cdef Py_ssize_t _receive(self, char *into, size_t size, bint is_long) except -1:
        """How many bytes came; 0: none are there."""
        cdef Py_ssize_t received
        cdef int error, fd
        while True:
            fd = _fileno(self._socket)
            # Not left to the socket: whoever gave us this end may make it block.
            if is_long:
                with nogil:
                    received = recv(fd, into, size, MSG_DONTWAIT)
                    error = errno
            else:
                received = recv(fd, into, size, MSG_DONTWAIT)
                error = errno
            if received > 0:
                return received
            if received == 0:
                raise self._gone()
            if self._is_to_wait(error):
                return 0

    # --- sending ------------------------------------------------------------------------

    def write(self, parts, uint32_t type, uint32_t flags=0, timeout_s=None):
        """As `Transport.write`, of at most 8 parts. A record that has begun to leave is finished
        whatever the timeout says, or the other side would take the next for the rest of it. When
        that side has not taken all by `finish_by`, the stream is closed and RingFull raised;
        without that time, PeerDied after 10 s in which it took nothing.

        What is left of a record when a signal's handler raises is kept, and sent before the next;
        RingFull: there was no room for that, and nothing of this record left."""
        cdef Py_buffer views[MAX_PARTS]
        cdef Header header
        cdef Leaving record
        cdef int n_views = 0, i
        header.length = 0
        record.first, record.count = 0, 1
        try:
            for part in parts:
                if n_views == MAX_PARTS:
                    raise RingError(f"more than {MAX_PARTS} parts; join some before")
                PyObject_GetBuffer(part, &views[n_views], PyBUF_SIMPLE)
                n_views += 1
                header.length += views[n_views - 1].len
                if views[n_views - 1].len:
                    record.pieces[record.count].iov_base = views[n_views - 1].buf
                    record.pieces[record.count].iov_len = views[n_views - 1].len
                    record.count += 1
            check_sendable(header.length)
            header.type = type
            header.flags = flags
            header.epoch = self._epoch
            header.sequence = self._n_sent
            record.pieces[0].iov_base = &header
            record.pieces[0].iov_len = sizeof(Header)
            record.n_left = sizeof(Header) + header.length
            self._write(&record, timeout_s)
        finally:
            for i in range(n_views):
                PyBuffer_Release(&views[i])

    cdef int _write(self, Leaving *record, object timeout_s) except -1:
        cdef size_t size = record.n_left - sizeof(Header)
        cdef double deadline = _deadline(timeout_s)
        cdef bint has_begun = False, is_long = size >= NOGIL_BYTES, is_late
        finish_by = self.finish_by
        if self._n_rest:
            self._finish_rest(deadline, timeout_s)
        try:
            while record.n_left:
                if self._send(record, is_long):
                    if not has_begun:
                        # As in `_fill`.
                        has_begun = is_long = True
                        self._n_sent += 1
                    deadline = monotonic() + STALL_S if finish_by is None else finish_by
                    # However little it takes at a time, and in whatever time.
                    is_late = record.n_left and monotonic() > deadline
                else:
                    is_late = not self._wait_for_room(deadline) or monotonic() > deadline
                if is_late:
                    if not has_begun or finish_by is not None:
                        raise RingFull(f"no room for {size} bytes within {timeout_s} s")
                    raise PeerDied(f"the other end took nothing for {STALL_S:g} s; stream closed")
                if record.n_left:
                    PyErr_CheckSignals()
        except BaseException as error:
            if has_begun and record.n_left:
                if isinstance(error, MoeshmError):
                    self.close()
                else:
                    self._keep(record)
            raise
        return 0

    cdef int _finish_rest(self, double deadline, object timeout_s) except -1:
        cdef Leaving rest
        cdef bint is_late
        while self._n_rest:
            rest.first, rest.count, rest.n_left = 0, 1, self._n_rest
            rest.pieces[0].iov_base = (
                PyBytes_AS_STRING(self._rest) + len(self._rest) - self._n_rest)
            rest.pieces[0].iov_len = self._n_rest
            if self._send(&rest, True):
                self._n_rest = rest.n_left
                is_late = self._n_rest and monotonic() > deadline
            else:
                is_late = not self._wait_for_room(deadline) or monotonic() > deadline
            if is_late:
                raise RingFull(
                    f"no room within {timeout_s} s for {self._n_rest} bytes that are left of a "
                    "record whose sender was interrupted")
            PyErr_CheckSignals()
        self._rest = None
        return 0

    cdef int _keep(self, Leaving *record) except -1:
        """A copy of what is left: the parts are their owner's again."""
        cdef char *to
        cdef int i
        try:
            self._rest = PyBytes_FromStringAndSize(NULL, record.n_left)
        except MemoryError:
            self.close()
            return 0
        to = PyBytes_AS_STRING(self._rest)
        for i in range(record.first, record.count):
            memcpy(to, record.pieces[i].iov_base, record.pieces[i].iov_len)
            to += record.pieces[i].iov_len
        self._n_rest = record.n_left
        return 0

    cdef Py_ssize_t _send(self, Leaving *record, bint is_long) except -1:
        """How many bytes left; 0: there is no room."""
        cdef msghdr message
        cdef Py_ssize_t sent
        cdef int error, fd
        memset(&message, 0, sizeof(msghdr))
        message.msg_iov = &record.pieces[record.first]
        message.msg_iovlen = record.count - record.first
        while True:
            fd = _fileno(self._socket)
            if is_long:
                with nogil:
                    sent = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
                    error = errno
            else:
                sent = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
                error = errno
            if sent >= 0:
                advance(record, sent)
                return sent
            if self._is_to_wait(error):
                return 0

    cdef bint _is_to_wait(self, int error) except -1:
        """After a failed system call; False: call it again. RingClosed, PeerDied."""
        if error == EAGAIN:
            return True
        if error != EINTR:
            raise self._gone() from OSError(error, strerror(error))
        PyErr_CheckSignals()
        return False


cdef void advance(Leaving *record, size_t sent) noexcept:
    cdef iovec *piece
    record.n_left -= sent
    while sent:
        piece = &record.pieces[record.first]
        if sent < piece.iov_len:
            piece.iov_base = <char *>piece.iov_base + sent
            piece.iov_len -= sent
            return
        sent -= piece.iov_len
        record.first += 1


def check_sendable(uint64_t size):
    """RingError: no record can be so long."""
    if size > <uint64_t>MAX_RECORD_BYTES:
        raise RingError(f"a record of {size} bytes; at most {MAX_RECORD_BYTES} may be sent")


cdef double _deadline(object timeout_s) except? -1:
    return INFINITY if timeout_s is None else monotonic() + <double>timeout_s
