"""The stream transport: a UNIX stream socket and no memory of its own.

A record is the ring's header of 32 bytes (length, type, flags, epoch, sequence) and its payload.
"""

from __future__ import annotations

import math
import os
import select
import socket
import time
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from .. import foreign_fds, protocol
from .._stream import MAX_RECORD_BYTES, StreamEnd, check_sendable
from ..dtypes import Array, DType
from ..errors import Corrupt, RingError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

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
#: Kernel buffers that a call of a few tokens fits into; the system may grant less.
_SOCKET_BYTES = 1 << 20


class StreamTransport(StreamEnd):
    """A `Transport` over a connected socket, which it owns. Here it waits; what moves bytes is
    compiled (`_stream.pyx`), for interrupts.

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
        super().__init__(sock, epoch, receive_capacity, StreamMessage)
        sock.setblocking(False)
        # Before the other side has its end: bytes that came with fds cost who reads them.
        foreign_fds.refuse(sock)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
        self.send_capacity = MAX_RECORD_BYTES
        self.buffer_bytes = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self.receive_capacity = receive_capacity
        self._drains = drains
        self._watch_pidfd = watch_pidfd

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

    def memory(self) -> list[memoryview]:
        """As `Transport.memory`: none."""
        return []

    def _wait_for_record(self, deadline: float) -> bool:
        """As `StreamEnd` says. By who may read."""
        is_last = False
        while not self._read(deadline + _LATE_S):
            if is_last or not self._poll(select.POLLIN, deadline):
                return False
            # What came in time is taken, however late this thread has its turn.
            is_last = time.monotonic() > deadline
        return True

    def _wait_for_room(self, deadline: float) -> bool:
        """As `StreamEnd` says. Takes in what arrives meanwhile."""
        if not self._drains:
            return self._poll(select.POLLOUT, deadline)
        with self._reading.tried() as may_read:
            if may_read:
                self._take_in(deadline)
        if may_read:
            return self._poll(select.POLLOUT | select.POLLIN, deadline)
        # Another thread receives; it may stop at any time.
        soon = time.monotonic() + _PATIENCE_S
        is_last = deadline <= soon
        return self._poll(select.POLLOUT, deadline if is_last else soon) or not is_last

    def _take_in(self, deadline: float) -> None:
        """What has arrived, into the inbox. By who may read."""
        # A peer that never stops sending must not keep this thread, nor fill the memory.
        while self._read(deadline + _LATE_S):
            if self._inbox_bytes > _MAX_INBOX_BYTES:
                self.close()
                raise Corrupt(
                    f"the other end of the stream sent {len(self._inbox)} records of "
                    f"{self._inbox_bytes} bytes instead of taking one; {_MAX_INBOX_BYTES} is "
                    "the most"
                )
            if time.monotonic() > deadline:
                return

    def _poll(self, events: int, deadline: float) -> bool:
        """Until there are such; False at the deadline."""
        most_ms = _SLICE_MS if self._drains else _LONGEST_POLL_MS
        while True:
            # Before it looks: a thread may have its turn again long after a slice.
            is_last = time.monotonic() > deadline
            slice_ms = min(most_ms, max(0.0, (deadline - time.monotonic()) * 1e3))
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
        check_sendable(size)
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
