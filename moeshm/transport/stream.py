"""The stream transport: a UNIX stream socket and no memory of its own.

A record is the ring's header of 32 bytes (length, type, flags, epoch, sequence) and its payload.
"""

from __future__ import annotations

import collections
import math
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from .. import foreign_fds, protocol
from .._closing import close_socket
from .._role import Role
from ..dtypes import Array, DType
from ..errors import Corrupt, PeerDied, RingClosed, RingEmpty, RingError, RingFull

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_HEADER = struct.Struct("<QIIQQ")
#: With a socket there is no memory that a limit could come from: of one record.
MAX_RECORD_BYTES = 256 << 20
#: How long the other side may take nothing in the middle of a record.
_STALL_S = 10.0
#: How long to leave receiving to another thread before looking whether it still does.
_PATIENCE_S = 0.01
#: How long a client sleeps at a time, as in the ring: the system may give a signal to another
#: thread, or to this one right before it sleeps. A worker's threads get none.
_SLICE_MS = 25.0
#: Of poll(2), which takes an int.
_LONGEST_POLL_MS = float((1 << 31) - 1)
#: How long the rest of a record may come in after a deadline, if it goes on coming.
_LATE_S = 0.004
#: What a sender takes in while it waits for room: replies to calls that were sent before.
_MAX_INBOX_BYTES = MAX_RECORD_BYTES
#: Of a record in the inbox, beside its bytes.
_MESSAGE_BYTES = 256
#: Kernel buffers that a call of a few tokens fits into; the system may grant less.
_SOCKET_BYTES = 1 << 20


class StreamTransport:
    """A `Transport` over a connected socket, which it owns.

    `drains`: while it waits for room to send, it takes in what arrives, so that two sides that
    both send never wait for each other. Of the two, the one whose incoming records are bounded
    by what it asked for does so: the client.

    `watch_pidfd`, or -1, tells of the other process's death; it stays the caller's. A child that
    the other side forked holds its socket, too, and would keep it from hanging up.
    """

    name = "stream"

    def __init__(
        self,
        sock: socket.socket,
        epoch: int,
        drains: bool,
        watch_pidfd: int = -1,
        receive_capacity: int = MAX_RECORD_BYTES,
    ) -> None:
        self._socket = sock
        sock.setblocking(False)
        # Before the other side has its end: bytes that came with fds cost who reads them.
        foreign_fds.refuse(sock)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
        self.send_capacity = MAX_RECORD_BYTES
        self.buffer_bytes = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self.receive_capacity = receive_capacity
        self._epoch = epoch
        self._drains = drains
        self._watch_pidfd = watch_pidfd
        self._sent = 0
        self.finish_by: float | None = None
        self._inbox: collections.deque[StreamMessage] = collections.deque()
        self._inbox_bytes = 0
        self._reader = _Reader(sock, epoch, receive_capacity)
        self._reading = Role()
        self._is_closed = False

    @classmethod
    def create(
        cls, epoch: int, watch_pidfd: int = -1, receive_capacity: int = MAX_RECORD_BYTES
    ) -> tuple[StreamTransport, list[int]]:
        """A worker's side, and the fd for the client, which is the caller's to close."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(ours, epoch, False, watch_pidfd, receive_capacity), [theirs.detach()]

    @classmethod
    def attach(cls, fd: int, epoch: int, watch_pidfd: int = -1) -> StreamTransport:
        """A client's side; it owns the fd. Corrupt when that is no stream socket."""
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            os.close(fd)
            raise Corrupt(f"fd {fd} is no UNIX stream socket ({error.strerror})") from None
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            sock.close()
            raise Corrupt(f"fd {fd} is no UNIX stream socket")
        return cls(sock, epoch, True, watch_pidfd)

    def __del__(self) -> None:
        # No shutdown: a forked child that forgets its copy must not end the parent's session.
        self._socket.close()

    def write(
        self, parts: Sequence[Any], type: int, flags: int = 0, timeout_s: float | None = None
    ) -> None:
        """As `Transport.write`. A record that has begun to leave is finished whatever the timeout
        says, or the other side would take the next for the rest of it. When that side has not
        taken all by `finish_by`, the stream is closed and RingFull raised; without that time,
        PeerDied after 10 s in which it took nothing."""
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        length = sum(map(len, views))
        _check_sendable(length)
        views.insert(0, memoryview(_HEADER.pack(length, type, flags, self._epoch, self._sent)))
        deadline = _deadline(timeout_s)
        finish_by = self.finish_by
        has_begun = False
        try:
            while views:
                sent = self._send(views)
                if sent:
                    has_begun = True
                    deadline = finish_by or time.monotonic() + _STALL_S
                    views = _rest(views, sent)
                    # However little it takes at a time, and in whatever time.
                    is_late = bool(views) and _is_past(deadline)
                else:
                    is_late = not self._wait_for_room(deadline) or _is_past(deadline)
                if is_late:
                    if not has_begun or finish_by is not None:
                        raise RingFull(f"no room for {length} bytes within {timeout_s} s")
                    raise PeerDied(f"the other end took nothing for {_STALL_S:g} s; stream closed")
            self._sent += 1
        except BaseException as error:
            # After an interrupt nobody knows how much left.
            if has_begun or not isinstance(error, Exception):
                self.close()
            raise

    def write_call(
        self,
        call_id: int,
        layer: int,
        hidden_states: Array,
        topk_ids: Array,
        topk_weights: Array,
        dtype: DType,
        deadline_ns: int,
        view: int = 0,
        rows: npt.NDArray[np.int64] | None = None,
    ) -> int:
        """As `Transport.write_call`."""
        parts = protocol.pack_rows(
            call_id, layer, hidden_states, topk_ids, topk_weights, dtype, deadline_ns, view, rows
        )
        # Also for the link, should it write the call again.
        self.finish_by = deadline_ns / 1e9 if deadline_ns else None
        self.write(parts, protocol.CALL, 0, 0.0)
        self.finish_by = None
        n_rows = len(hidden_states) if rows is None else len(rows)
        return protocol.call_bytes(n_rows, topk_ids.shape[1], hidden_states.shape[1], dtype)

    def reserve(
        self, size: int, type: int, flags: int = 0, timeout_s: float | None = None
    ) -> StreamReservation:
        """As `Transport.reserve`; here memory is private, and only `commit` waits."""
        return StreamReservation(self, size, type, flags, timeout_s)

    def acquire(self, timeout_s: float | None = None) -> StreamMessage:
        """As `Transport.acquire`."""
        deadline = _deadline(timeout_s)
        n_given = None
        try:
            with self._reading.tried(math.inf if deadline is None else deadline) as may_read:
                if not may_read:
                    raise RingEmpty(f"another thread took records in for {timeout_s} s")
                n_given = self._n_given()
                return self._take(deadline, timeout_s)
        except BaseException as error:
            # Interrupted with a record in hand, which is lost; also when `with` has ended.
            if not isinstance(error, Exception) and n_given not in (None, self._n_given()):
                self.close()
            raise

    def _take(self, deadline: float | None, timeout_s: float | None) -> StreamMessage:
        """The next record. By who may read."""
        if self._inbox:
            taken = self._inbox.popleft()
            self._inbox_bytes -= len(taken) + _MESSAGE_BYTES
            return taken
        is_last = False
        while (message := self._read(deadline)) is None:
            if is_last or not self._poll(select.POLLIN, deadline):
                raise RingEmpty(f"no record within {timeout_s} s")
            # What came in time is taken, however late this thread has its turn.
            is_last = _is_past(deadline)
        return message

    @property
    def has_unread(self) -> bool:
        """As `Transport.has_unread`."""
        return bool(self._inbox)

    def _n_given(self) -> int:
        """Records that were read and do not lie here any more."""
        return self._reader.n_read - len(self._inbox)

    @property
    def is_closed(self) -> bool:
        """As `Transport.is_closed`."""
        return self._is_closed

    def memory(self) -> list[memoryview]:
        """As `Transport.memory`: none."""
        return []

    def close(self) -> None:
        """As `Transport.close`."""
        self._is_closed = True
        # Also a second time: an interrupt may have come in between.
        close_socket(self._socket, True)

    def _send(self, views: list[memoryview]) -> int:
        try:
            return self._socket.sendmsg(views, [], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._gone() from error

    def _wait_for_room(self, deadline: float | None) -> bool:
        """Until something may be sent; False at the deadline. Takes in what arrives meanwhile."""
        if not self._drains:
            return self._poll(select.POLLOUT, deadline)
        with self._reading.tried() as may_read:
            if may_read:
                self._take_in(deadline)
        if may_read:
            return self._poll(select.POLLOUT | select.POLLIN, deadline)
        # Another thread receives; it may stop at any time.
        soon = time.monotonic() + _PATIENCE_S
        is_last = deadline is not None and deadline <= soon
        return self._poll(select.POLLOUT, deadline if is_last else soon) or not is_last

    def _take_in(self, deadline: float | None) -> None:
        """What has arrived, into the inbox. By who may read."""
        # A peer that never stops sending must not keep this thread, nor fill the memory.
        while (message := self._read(deadline)) is not None:
            self._inbox.append(message)
            self._inbox_bytes += len(message) + _MESSAGE_BYTES
            if self._inbox_bytes > _MAX_INBOX_BYTES:
                self.close()
                raise Corrupt(
                    f"the other end of the stream sent {len(self._inbox)} records of "
                    f"{self._inbox_bytes} bytes instead of taking one; {_MAX_INBOX_BYTES} is "
                    "the most"
                )
            if _is_past(deadline):
                return

    def _poll(self, events: int, deadline: float | None) -> bool:
        """Until there are such; False at the deadline."""
        while True:
            slice_ms = _SLICE_MS if self._drains else _LONGEST_POLL_MS
            # Before it looks: a thread may have its turn again long after a slice.
            is_last = _is_past(deadline)
            if deadline is not None:
                slice_ms = min(slice_ms, max(0.0, (deadline - time.monotonic()) * 1e3))
            ready = self._ready(events, slice_ms)
            if ready == {self._watch_pidfd}:
                # What was sent before the end comes first.
                ready = self._ready(events, 0.0)
                if ready == {self._watch_pidfd}:
                    raise self._gone()
            if ready:
                return True
            if is_last:
                return False

    def _ready(self, events: int, timeout_ms: float) -> set[int]:
        """Which of the socket and the pidfd have something."""
        poll = select.poll()
        try:
            poll.register(self._socket, events)
        except ValueError:  # another thread closed it
            raise self._gone() from None
        if self._watch_pidfd >= 0:
            poll.register(self._watch_pidfd, select.POLLIN)
        return {fd for fd, _ in poll.poll(timeout_ms)}

    def _read(self, deadline: float | None) -> StreamMessage | None:
        """The next record, once all of it is there; a little after the deadline at most."""
        try:
            return self._reader.read(math.inf if deadline is None else deadline + _LATE_S)
        except BlockingIOError:
            return None
        except (EOFError, OSError) as error:
            raise self._gone() from error
        except BaseException:
            # Corrupt, or an interrupt after which nobody knows how much came.
            self.close()
            raise

    def _gone(self) -> RingClosed | PeerDied:
        if self._is_closed:
            return RingClosed("this end of the stream is closed")
        return PeerDied("the other end of the stream is gone, and all it sent was read")


class _Reader:
    """Assembles records from what a socket has."""

    def __init__(self, sock: socket.socket, epoch: int, max_bytes: int) -> None:
        self._socket = sock
        self._epoch = epoch
        self._max_bytes = max_bytes
        self._sequence = 0
        self._header = bytearray(_HEADER.size)
        self._message: StreamMessage | None = None
        self._filled = 0

    @property
    def n_read(self) -> int:
        """Whole records, so far."""
        return self._sequence - (self._message is not None)

    def read(self, until: float) -> StreamMessage:
        """The next whole record; EOFError at the end; Corrupt. BlockingIOError: not all of it is
        there, or it still comes in at that time, of time.monotonic."""
        if self._message is None:
            self._fill(self._header, until)
            length, kind, flags, epoch, sequence = _HEADER.unpack(self._header)
            if length > self._max_bytes or (epoch, sequence) != (self._epoch, self._sequence):
                raise Corrupt(
                    f"the other end of the stream sent record {sequence} of epoch {epoch} with "
                    f"{length} bytes; expected record {self._sequence} of epoch {self._epoch}, "
                    f"with at most {self._max_bytes}"
                )
            self._sequence += 1
            self._filled = 0
            self._message = StreamMessage(length)
            self._message.describe(kind, flags, sequence)
        self._fill(self._message, until)
        message, self._message = self._message, None
        self._filled = 0
        return message

    def _fill(self, buffer: bytearray, until: float) -> None:
        with memoryview(buffer) as view:
            while self._filled < len(buffer):
                # Not left to the socket: whoever gave us this end may make it block.
                received = self._socket.recv_into(view[self._filled :], 0, socket.MSG_DONTWAIT)
                if received == 0:
                    raise EOFError
                self._filled += received
                if self._filled < len(buffer) and time.monotonic() > until:
                    raise BlockingIOError


class _Buffer(bytearray):
    """Private memory of a record."""

    def array(self, dtype: npt.DTypeLike, shape: tuple[int, ...], offset: int = 0) -> Array:
        """An ndarray over the bytes from `offset` on; ValueError when it does not fit."""
        return np.frombuffer(self, dtype, math.prod(shape), offset).reshape(shape)


class StreamMessage(_Buffer):
    """A record that came."""

    type = flags = sequence = 0

    def describe(self, type: int, flags: int, sequence: int) -> None:
        """Say what came with the bytes."""
        self.type, self.flags, self.sequence = type, flags, sequence

    def copy_to(self, destination: WriteableBuffer | Array, offset: int = 0) -> None:
        """Fill a writable contiguous buffer from `offset` on; ValueError: the record has less."""
        with memoryview(cast("WriteableBuffer", destination)).cast("B") as target:
            if offset + len(target) > len(self):
                raise ValueError(f"{len(target)} bytes from {offset}: the record has {len(self)}")
            target[:] = memoryview(self)[offset : offset + len(target)]

    def release(self) -> None:
        """As `Message.release`: nothing, the memory is private."""


class StreamReservation(_Buffer):
    """A record that is being filled."""

    def __new__(cls, *_: object) -> StreamReservation:
        return super().__new__(cls)

    def __init__(
        self, transport: StreamTransport, size: int, type: int, flags: int, timeout_s: float | None
    ) -> None:
        _check_sendable(size)
        super().__init__(size)
        self._transport = transport
        self._arguments = type, flags, timeout_s
        self._is_open = True

    def commit(self) -> None:
        """Send it; errors as `Transport.write`."""
        self._check_open()
        self._transport.write((self,), *self._arguments)
        self._is_open = False

    def abort(self) -> None:
        """Forget it."""
        self._check_open()
        self._is_open = False

    def _check_open(self) -> None:
        if not self._is_open:
            raise RingError("this record was committed or aborted already")


def _check_sendable(size: int) -> None:
    if size > MAX_RECORD_BYTES:
        raise RingError(f"a record of {size} bytes; at most {MAX_RECORD_BYTES} may be sent")


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


def _is_past(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _rest(views: list[memoryview], sent: int) -> list[memoryview]:
    """What is left of the views after their first `sent` bytes."""
    for index, view in enumerate(views):
        if sent < len(view):
            return [view[sent:], *views[index + 1 :]]
        sent -= len(view)
    return []
