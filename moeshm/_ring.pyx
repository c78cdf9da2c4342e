"""The lock-free ring: variable-size records from one producer to one consumer, in shared memory.

`_end.pyx` says how the two ends tell each other where they are; `_mapping.pyx`, where in memory.
A record is a 32-byte header and its payload, 64-byte aligned. Several may be held at each end at
a time; the order in which they were begun is the order in which they are published.
"""

cimport cython
cimport numpy as cnp
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.exc cimport PyErr_CheckSignals
from cpython.memoryview cimport PyMemoryView_FromObject
from cpython.ref cimport Py_INCREF
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

import fcntl
import os

from . import segment
from ._atomics cimport moeshm_copy, moeshm_give_way, moeshm_load_relaxed, moeshm_now_ns
from ._crash_points cimport (
    AT_ABORT, AT_ABORTED, AT_ACQUIRE, AT_ACQUIRED, AT_HEADER_CHECKED, AT_HEADER_WRITTEN,
    AT_RECORD_FOUND, AT_RESERVE, AT_RESERVED, AT_ROOM_MADE, crash_point,
)
from ._end cimport CLOSED, REBASED, SLOTS, RingEnd, ahead, deadline_of
from ._mapping cimport (
    ALIGNMENT, CONSUMER, PAGE, PRODUCER, Mapping, Role, attach_segment, create_segment,
)
from .errors import RingClosed, RingEmpty, RingError, RingFull

cnp.import_array()

cdef extern from "numpy/arrayobject.h":
    # Steals a reference to `descr`.
    object PyArray_NewFromDescr(type subtype, cnp.dtype descr, int nd, cnp.npy_intp *dims,
                                cnp.npy_intp *strides, void *data, int flags, void *obj)

cdef enum:
    HEADER = 32
    INLINE_MAX = 64     # payloads up to a cache line follow their header at once
    MAX_PARTS = 8

cdef enum:
    # Records taken back that are passed over in one go.
    MOST_SKIPPED = 256

# Flags from here on belong to the ring.
cdef uint32_t ABORTED = <uint32_t>1 << 31
# The producer goes back to the beginning when the ring is empty and this much of it was used: a
# part of a core's L2. Asking costs a cache miss, so small messages ask rarely.
cdef uint64_t HOT_BYTES = 128 << 10
# Copies from this size on let other Python threads run meanwhile.
cdef uint64_t NOGIL_BYTES = 64 << 10

MAX_OUTSTANDING = SLOTS
MAX_CAPACITY = 1 << 39
HEADER_BYTES = HEADER


cdef inline uint64_t payload_offset(uint64_t length) noexcept nogil:
    return HEADER if length <= INLINE_MAX else ALIGNMENT


cdef inline uint64_t record_size(uint64_t length) noexcept nogil:
    return (payload_offset(length) + length + ALIGNMENT - 1) & ~<uint64_t>(ALIGNMENT - 1)


cdef Role role_of(type cls) except? PRODUCER:
    return PRODUCER if issubclass(cls, RingProducer) else CONSUMER


cdef RingEnd create_ring(type cls, object name, object capacity, uint64_t epoch,
                         object spin_us, uint64_t first_position):
    cdef RingEnd ring = cls.__new__(cls)
    ring._choose_spin(spin_us)
    if not 1 <= capacity <= MAX_CAPACITY:
        raise RingError(f"capacity={capacity}; it must lie in 1..{MAX_CAPACITY}")
    if first_position % ALIGNMENT or first_position >> 63:
        raise RingError(f"first_position={first_position}; it must be a multiple of {ALIGNMENT} "
                        "below 2^63")
    # One page more than the capacity: room for the header of a message that fills it.
    area = max(PAGE, 1 << (int(capacity) - 1).bit_length()) + PAGE
    fd = (segment.create_anonymous(PAGE + area) if name is None
          else segment.create_named(name, PAGE + area))
    try:
        mapping = create_segment(fd, role_of(cls), area, epoch, first_position)
        ring._open(mapping, role_of(cls), fd, name, True)
    except BaseException:
        os.close(fd)
        if name is not None:
            segment.unlink(name)
        raise
    return ring


cdef RingEnd attach_ring(type cls, object source, object epoch, object spin_us):
    cdef RingEnd ring = cls.__new__(cls)
    # First: once attached, a ring is taken.
    ring._choose_spin(spin_us)
    is_named = isinstance(source, str)
    if is_named:
        fd = segment.open_named(source)
    else:
        segment.check_received(source)
        fd = fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, 0)
    try:
        mapping = attach_segment(fd, role_of(cls), epoch)
        ring._open(mapping, role_of(cls), fd, source if is_named else None, False)
    except BaseException:
        os.close(fd)
        raise
    if is_named:
        # Both ends have it: the name is of no more use, and would outlive a crash.
        segment.unlink(source)
    return ring


# --- producer ---------------------------------------------------------------------------


cdef class RingProducer(RingEnd):
    """The end that writes; one thread at a time."""

    @classmethod
    def create(cls, name, capacity, *, epoch=0, spin_us=None, first_position=0):
        """Make a segment and be its producer.

        `name` is a POSIX name like "/ring", or None for anonymous memory whose `fileno()` is
        passed on. `capacity`, in bytes, is rounded up to a power of two of at least a page; a
        message that large fits. `spin_us`: the longest busy wait, by default MOESHM_SPIN_US.
        `first_position` is where positions start to count, a multiple of 64; for tests.
        SegmentError: the name is taken or memory is short, with sizes. RingError: `capacity`.
        """
        return create_ring(cls, name, capacity, epoch, spin_us, first_position)

    @classmethod
    def attach(cls, source, *, epoch=None, spin_us=None):
        """Be the producer of a segment that its consumer made.

        `source` is a name, which is unlinked, or a file descriptor, which stays the caller's.
        SegmentError: no such ring, not sealed, another version or `epoch`, or taken.
        """
        return attach_ring(cls, source, epoch, spin_us)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.close()

    def reserve(self, uint64_t size, uint32_t type=0, uint32_t flags=0, timeout_s=None):
        """A writable buffer of `size` bytes in the ring, to be committed or aborted.

        Up to MAX_OUTSTANDING may be open at a time; they are published in the order in which
        they were reserved. `type` and `flags` (below 2^31) go along. RingFull: no room within
        `timeout_s` (None waits for ever). RingError: `size` exceeds the capacity, or too many
        are open. RingClosed, PeerDied, Corrupt: the other end is of no more use.
        """
        cdef unsigned slot
        cdef uint64_t sequence
        # Allocating may start a garbage collection, and that may close the ring.
        cdef Mapping mapping = self.mapping
        cdef char *payload = self._begin(size, type, flags, timeout_s, &slot, &sequence)
        cdef Reservation reservation = Reservation.__new__(Reservation)
        reservation.ring = self
        reservation.mapping = mapping
        reservation.payload = payload
        reservation.size = size
        reservation.sequence = sequence
        reservation.slot = slot
        reservation.is_open = reservation.is_writable = True
        return reservation

    def write(self, parts, uint32_t type=0, uint32_t flags=0, timeout_s=None):
        """Send one message made of the given buffers, one after the other; errors as `reserve`.

        Each part is contiguous; at most 8 of them.
        """
        cdef Py_buffer views[MAX_PARTS]
        cdef int count = 0, i
        cdef uint64_t total = 0
        cdef unsigned slot
        cdef char *at
        cdef Mapping _alive = self.mapping      # also after a close() by another thread
        try:
            for part in parts:
                if count == MAX_PARTS:
                    raise RingError(f"more than {MAX_PARTS} parts; join some before")
                PyObject_GetBuffer(part, &views[count], PyBUF_SIMPLE)
                total += views[count].len
                count += 1
            at = self._begin(total, type, flags, timeout_s, &slot, NULL)
            if total >= NOGIL_BYTES:
                with nogil:
                    copy_parts(at, views, count)
                self._check_usable()
            else:
                copy_parts(at, views, count)
            self._finish(slot)
        finally:
            for i in range(count):
                PyBuffer_Release(&views[i])

    cdef char *_begin(self, uint64_t length, uint32_t type, uint32_t flags, object timeout_s,
                      unsigned *slot, uint64_t *sequence) except NULL:
        """Hold the next record and write its header; where the payload goes."""
        cdef Header *header
        cdef uint64_t size = record_size(length)
        cdef int64_t deadline_ns = deadline_of(timeout_s)
        if length > self.capacity:
            raise RingError(f"a message of {length} bytes exceeds the ring's capacity of "
                            f"{self.capacity}; send less at once or make a larger ring")
        if flags & ABORTED:
            raise RingError(f"flags={flags:#x}; they must be below 2^31")
        self._check_may_take("reservations are open; commit or abort some")
        crash_point(AT_RESERVE, self.own)
        header = <Header *>self._make_room(size, deadline_ns)
        crash_point(AT_ROOM_MADE, self.own)
        header.length = length
        header.type = type
        header.flags = flags
        header.epoch = self.epoch
        header.sequence = self.next_sequence
        if sequence != NULL:
            sequence[0] = self.next_sequence
        crash_point(AT_HEADER_WRITTEN, self.own)
        slot[0] = self._hold(size)
        crash_point(AT_RESERVED, self.own)
        return <char *>header + payload_offset(length)

    cdef char *_make_room(self, uint64_t size, int64_t deadline_ns) except NULL:
        """Wait until `size` bytes are free at the next position; where they are."""
        if self.window.count == 0 and self.next_offset and self.next_offset + size > HOT_BYTES:
            self._check_peer()
            if self.peer_position == self.next_position:
                self.next_offset = 0
                self.rebased ^= REBASED
        while ahead(self.next_position, self.peer_position) + size > self.area:
            self._check_peer()
            if ahead(self.next_position, self.peer_position) + size <= self.area:
                break
            if self._wait(deadline_ns) == 0:
                raise RingFull(
                    f"no room for {size} bytes: {ahead(self.next_position, self.peer_position)} "
                    f"of {self.area} are unread; read faster or make a larger ring")
        if moeshm_load_relaxed(self.peer_state) & CLOSED:
            raise RingClosed("the consumer closed the ring")
        return self.mapping.data + self.next_offset

    cdef int _check_peer(self) except -1:
        # A consumer never rebases.
        if (not self._load_peer() or self.seen & REBASED
                or ahead(self.published, self.peer_position) > self.area):
            self._corrupt(f"the position word {self.seen:#x}, but {self.published} was published")
        return 0


cdef void copy_parts(char *to, Py_buffer *views, int count) noexcept nogil:
    cdef int i
    for i in range(count):
        moeshm_copy(to, <char *>views[i].buf, views[i].len)
        to += views[i].len


# --- consumer ---------------------------------------------------------------------------


cdef class RingConsumer(RingEnd):
    """The end that reads; one thread at a time."""

    @classmethod
    def create(cls, name, capacity, *, epoch=0, spin_us=None, first_position=0):
        """Make a segment and be its consumer; as `RingProducer.create`."""
        return create_ring(cls, name, capacity, epoch, spin_us, first_position)

    @classmethod
    def attach(cls, source, *, epoch=None, spin_us=None):
        """Be the consumer of a segment that its producer made; as `RingProducer.attach`."""
        return attach_ring(cls, source, epoch, spin_us)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.close()

    def acquire(self, timeout_s=None):
        """The next record, in place; its memory is the producer's again once it is released.

        Up to MAX_OUTSTANDING may be open at a time. RingEmpty: none came within `timeout_s`
        (None waits for ever, 0 does not wait). RingClosed, PeerDied: none will come, and all
        that were sent have been read. Corrupt: the producer wrote something impossible.
        """
        cdef Header header
        cdef Record record
        cdef char *at
        cdef uint64_t size
        cdef unsigned slot
        cdef int64_t deadline_ns = -1
        cdef uint64_t skipped = 0
        # Allocating may start a garbage collection, and that may close the ring.
        cdef Mapping mapping = self.mapping
        self._check_may_take("records are open; release some")
        crash_point(AT_ACQUIRE, self.own)
        while True:
            if self._has_record():
                crash_point(AT_RECORD_FOUND, self.own)
                at = mapping.data + self.next_offset
                memcpy(&header, at, sizeof(Header))
                size = self._check_header(&header)
                crash_point(AT_HEADER_CHECKED, self.own)
                if not header.flags & ABORTED:
                    break
                self._skip(size)
                if self.peer_position != self.next_position:
                    skipped += 1
                    if skipped % MOST_SKIPPED == 0:
                        if deadline_ns < 0:
                            deadline_ns = deadline_of(timeout_s)
                        self._pause_skipping(deadline_ns, timeout_s)
                    continue
            if deadline_ns < 0:
                deadline_ns = deadline_of(timeout_s)
            else:
                # The last wait ended for nothing, and so may each that follows.
                PyErr_CheckSignals()
                if moeshm_now_ns() >= deadline_ns:
                    raise RingEmpty(f"no record within {timeout_s} s")
            self._check_may_take("records are open; release some")
            if self._wait(deadline_ns) == 0:
                raise RingEmpty(f"no record within {timeout_s} s")
        slot = self._hold(size)
        crash_point(AT_ACQUIRED, self.own)
        record = Record.__new__(Record)
        record.ring = self
        record.mapping = mapping
        record.payload = at + payload_offset(header.length)
        record.size = header.length
        record.sequence = header.sequence
        record.type = header.type
        record.flags = header.flags
        record.slot = slot
        record.is_open = True
        return record

    cdef int _pause_skipping(self, int64_t deadline_ns, object timeout_s) except -1:
        """A producer that takes back without end must not keep other threads from running, nor
        signals from being seen, nor the deadline."""
        PyErr_CheckSignals()
        if moeshm_now_ns() >= deadline_ns:
            raise RingEmpty(f"no record within {timeout_s} s, behind {MOST_SKIPPED} or more that "
                            "were taken back; ask again for what comes after them")
        with nogil:
            moeshm_give_way()
        self._check_may_take("records are open; release some")
        return 0

    cdef bint _has_record(self) except -1:
        cdef uint64_t before
        if self.peer_position != self.next_position:
            return True
        before = self.seen
        if not self._load_peer() or ahead(self.peer_position, self.published) > self.area:
            self._corrupt(f"the position word {self.seen:#x}, but {self.published} was freed")
        if (before ^ self.seen) & REBASED:
            self.next_offset = 0
        return self.peer_position != self.next_position

    cdef uint64_t _check_header(self, Header *header) except 0:
        cdef uint64_t available = ahead(self.peer_position, self.next_position)
        if header.length > self.capacity or record_size(header.length) > available:
            self._corrupt(f"a record of {header.length} bytes where {available} were published")
        if header.epoch != self.epoch or header.sequence != self.next_sequence:
            self._corrupt(f"record {header.sequence} of epoch {header.epoch}, expected "
                          f"{self.next_sequence} of {self.epoch}")
        return record_size(header.length)


# --- records ----------------------------------------------------------------------------


cdef class Held:
    """A record that an end holds; a buffer."""

    def __len__(self):
        return self.size

    def __getbuffer__(self, Py_buffer *view, int flags):
        self._check_open()
        PyBuffer_FillInfo(view, self, self.payload, self.size, not self.is_writable, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1

    cdef int _check_open(self) except -1:
        if not self.is_open:
            raise RingError("this record was committed, aborted or released already")
        return 0

    cdef int _check_unviewed(self) except -1:
        if self.exports:
            raise BufferError(f"{self.exports} views of record {self.sequence} are in use; "
                              "delete them first, or copy what must outlive it")
        return 0

    cdef object _array(self, object dtype, object shape, uint64_t offset):
        cdef cnp.dtype descr = dtype if isinstance(dtype, cnp.dtype) else cnp.dtype(dtype)
        cdef cnp.npy_intp dims[8]
        cdef int nd = len(shape), i
        cdef uint64_t nbytes = descr.itemsize, limit = self.size
        cdef Lease lease
        if nd > 8 or descr.hasobject or not nbytes:
            raise ValueError(f"dtype {descr} of {nd} dimensions cannot lie in a record")
        for i in range(nd):
            dims[i] = shape[i]
            if dims[i] == 0:
                nbytes = 0
        self._check_open()
        for i in range(nd):
            if dims[i] < 0 or (nbytes and <uint64_t>dims[i] > limit // nbytes):
                raise ValueError(f"shape {shape} of {descr} exceeds the record's {limit} bytes")
            nbytes *= dims[i]
        if offset > limit or nbytes > limit - offset:
            raise ValueError(f"{nbytes} bytes at {offset} exceed the record's {limit} bytes")
        if <uint64_t>(self.payload + offset) % <uint64_t>descr.alignment:
            raise ValueError(f"offset={offset}; {descr} needs a multiple of {descr.alignment}")
        lease = Lease.__new__(Lease)
        lease.held = self
        self.exports += 1
        Py_INCREF(descr)
        array = PyArray_NewFromDescr(
            cnp.ndarray, descr, nd, dims, NULL, self.payload + offset,
            cnp.NPY_ARRAY_CARRAY if self.is_writable else cnp.NPY_ARRAY_CARRAY_RO, NULL)
        cnp.set_array_base(array, lease)
        return array


@cython.final
@cython.no_gc
cdef class Lease:
    """What an array over a record refers to: counts as one view for as long as it lives."""

    cdef Held held

    def __dealloc__(self):
        # Python code can make one that leases nothing: type(array.base)().
        if self.held is not None:
            self.held.exports -= 1


@cython.final
@cython.no_gc_clear
cdef class Reservation(Held):
    """A record being written; `with` gives its memoryview, commits, or aborts on an exception."""

    def __dealloc__(self):
        # Forgotten: nobody else will end it, and later records wait for it.
        if self.is_open:
            self._abort()

    def commit(self):
        """Let the consumer have it; BufferError (and nothing changed) while a view is in use."""
        self._check_open()
        self._check_unviewed()
        self.ring._check_usable()
        self.is_open = False
        self.ring._finish(self.slot)

    def abort(self):
        """Take it back; the consumer never sees it."""
        self._check_open()
        self._abort()

    cdef void _abort(self) noexcept:
        cdef RingEnd ring = self.ring
        cdef uint64_t size
        self.is_open = False
        if not ring._may_touch():
            return
        crash_point(AT_ABORT, ring.own)
        if self.slot == (ring.window.first + ring.window.count - 1) % SLOTS and not self.exports:
            # The newest: as if it had never been.
            size = ring.window.spans[self.slot].size
            ring.window.count -= 1
            ring.next_position = ahead(ring.next_position, size)
            ring.next_offset += (0 if ring.next_offset >= size else ring.area) - size
            ring.next_sequence -= 1
        else:
            (<Header *>(self.payload - payload_offset(self.size))).flags |= ABORTED
            ring._finish(self.slot)
        crash_point(AT_ABORTED, ring.own)

    def array(self, dtype, shape, offset=0):
        """A writable ndarray of `dtype` and `shape` over the bytes from `offset` on.

        ValueError: it does not fit. It counts as a view until it is gone.
        """
        return self._array(dtype, shape, offset)

    def __enter__(self):
        self.view = PyMemoryView_FromObject(self)
        return self.view

    def __exit__(self, kind, error, traceback):
        view, self.view = self.view, None
        try:
            view.release()
        except BufferError:
            if kind is None:
                raise
        if self.is_open:
            if kind is None:
                self.commit()
            else:
                self._abort()


@cython.final
@cython.no_gc_clear
cdef class Record(Held):
    """A record being read; `with` releases it at the end."""

    def __dealloc__(self):
        if self.is_open:
            self._release()

    def release(self):
        """Give its memory back; BufferError (and nothing changed) while a view is in use."""
        self._check_open()
        self._check_unviewed()
        self._release()

    cdef void _release(self) noexcept:
        self.is_open = False
        if self.ring._may_touch():
            self.ring._finish(self.slot)

    def copy_to(self, destination, uint64_t offset=0):
        """Fill a writable contiguous buffer with the bytes from `offset` on.

        ValueError: the record has fewer.
        """
        cdef Py_buffer view
        self._check_open()
        PyObject_GetBuffer(destination, &view, PyBUF_WRITABLE)
        try:
            if offset > self.size or <uint64_t>view.len > self.size - offset:
                raise ValueError(f"{view.len} bytes from {offset} on: the record has {self.size}")
            if <uint64_t>view.len >= NOGIL_BYTES:
                self.exports += 1
                with nogil:
                    moeshm_copy(<char *>view.buf, self.payload + offset, view.len)
                self.exports -= 1
            else:
                memcpy(view.buf, self.payload + offset, view.len)
        finally:
            PyBuffer_Release(&view)

    def array(self, dtype, shape, offset=0):
        """A read-only ndarray of `dtype` and `shape` over the bytes from `offset` on.

        ValueError: it does not fit. It counts as a view until it is gone, and the producer can
        still change its bytes: copy what is parsed before it is checked.
        """
        return self._array(dtype, shape, offset)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.is_open and (kind is None or not self.exports):
            self.release()
