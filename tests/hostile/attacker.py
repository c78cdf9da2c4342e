"""A client of bytes alone: sockets, mapped memory and msgpack, with none of moeshm's checks."""

from __future__ import annotations

import array
import contextlib
import errno
import mmap
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest

#: Of a record, over either transport: length, type, flags, epoch, sequence.
RECORD = struct.Struct("<QIIQQ")
CALL, REPLY, ORDER, DESCRIPTOR = 1, 2, 3, 4
#: Of a record's flags: its producer took it back.
ABORTED = 1 << 31
PAGE, CACHE_LINE = 4096, 64
#: socket(7); as in moeshm/foreign_fds.py.
SO_PASSRIGHTS = 83
#: Where a ring's control page keeps its words; moeshm/_mapping.pxd.
PRODUCER_WORD, PRODUCER_STATE, CONSUMER_WORD, CONSUMER_STATE = 256, 384, 512, 640
PATIENCE_S = 20.0
_encode = msgspec.msgpack.encode


def hello(**changed: Any) -> bytes:
    """A packet that says hello."""
    fields = {"type": "hello", "protocol": 1, "version": "x", "transport": "auto"}
    return b"\0" + _encode({**fields, "batch_capacity": 8, **changed})


def kernel_refuses_fds() -> bool:
    """Whether a socket can be told to let none through: from Linux 6.16 on."""
    left, right = socket.socketpair()
    with left, right:
        try:
            right.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
            return False
    return True


def send_fds(sock: socket.socket, data: bytes, fds: Sequence[int], are_refused: bool) -> bool:
    """Send fds along with the data; or, with False, the data alone, where they must be refused."""
    if are_refused and fds:
        with pytest.raises(PermissionError):
            socket.send_fds(sock, [data], fds)
        sock.sendall(data)
        return False
    socket.send_fds(sock, [data], fds)
    return True


class Attacker:
    """A connection to a worker, and its session once `shake_hands` was called."""

    def __init__(self, address: str) -> None:
        #: Whether the worker's sockets let no fds through.
        self.fds_are_refused = False
        self.control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Not settimeout: then it fails at once where the worker's queue is full.
        patience = struct.pack("ll", int(PATIENCE_S), 0)
        self.control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        try:
            self.control.connect(address.removeprefix("unix:"))
        except OSError:
            self.control.close()
            raise
        self.control.settimeout(PATIENCE_S)
        #: What it would like its calls to travel by.
        self.transport_wish = "auto"
        self.stream: socket.socket | None = None
        #: The control page and the data area, once, of the rings for calls and for replies.
        self.calls = self.replies = mmap.mmap(-1, PAGE)
        #: The flags and the data of a pinned slab, if one was asked for.
        self.slab = mmap.mmap(-1, PAGE)
        self.has_slab = False
        #: Of the last call in it.
        self.slab_sequence = 0
        self.epoch = 0
        self.sequence = 0
        #: Good calls that were answered.
        self.n_served = 0
        self._position = 0
        self._read_position = 0

    def shake_hands(self, transport: str, slab: str = "") -> None:
        """Get a session like anyone."""
        self.control.send(hello(transport=transport, slab=slab))
        self.take_welcome()

    def take_welcome(self) -> None:
        """Receive the answer to a hello, and what comes with it."""
        answer, fds = self.receive_control()
        assert answer["type"] == "welcome", answer
        self.epoch = answer["epoch"]
        if answer["slab"]:
            fd = fds.pop()
            self.has_slab = True
            self.slab = mmap.mmap(fd, os.fstat(fd).st_size)
            os.close(fd)
        if answer["transport"] == "stream":
            self.stream = socket.socket(fileno=fds[0])
            self.stream.settimeout(PATIENCE_S)
            return
        self.calls, self.replies = (mmap.mmap(fd, os.fstat(fd).st_size) for fd in fds)
        for fd in fds:
            os.close(fd)

    def send_fds(self, sock: socket.socket, data: bytes, fds: Sequence[int]) -> bool:
        """As the function of that name."""
        return send_fds(sock, data, fds, self.fds_are_refused)

    def receive_control(self) -> tuple[dict[str, Any], list[int]]:
        """The worker's next handshake message."""
        data, fds = b"", array.array("i")
        while True:
            room = 1 << 16, socket.CMSG_SPACE(16)
            try:
                packet, ancillary, _, _ = self.control.recvmsg(*room)
            except ConnectionResetError:
                # It left something unread; told once, before its last words.
                packet, ancillary, _, _ = self.control.recvmsg(*room)
            for _, _, numbers in ancillary:
                fds.frombytes(numbers)
            data += packet[1:]
            if packet[:1] != b"\1":
                return (msgspec.msgpack.decode(data) if packet else {}), list(fds)

    def farewell(self) -> tuple[str, str]:
        """Type and reason of what the worker says before it ends the session; both empty when it
        just leaves."""
        try:
            message, _ = self.receive_control()
        except ConnectionResetError:
            return "", ""
        if not message:
            return "", ""
        assert message["type"] in ("goodbye", "refusal"), message
        with contextlib.suppress(ConnectionResetError):
            assert self.control.recv(1) == b"", "the worker keeps the connection"
        return message["type"], str(message["reason"])

    def last_word(self) -> str:
        """The reason alone."""
        return self.farewell()[1]

    def record(self, payload: bytes, **changed: int) -> bytes:
        """Header and payload as they lie in a ring, or come over a stream."""
        header = {"length": len(payload), "type": CALL, "flags": 0}
        header.update(epoch=self.epoch, sequence=self.sequence)
        header.update(changed)
        self.sequence += 1
        packed = RECORD.pack(*header.values())
        gap = 32 if self.stream is None and len(payload) > 64 else 0
        return packed + bytes(gap) + payload

    def send(self, payload: bytes, **changed: int) -> None:
        """Send a record, whatever its header says."""
        data = self.record(payload, **changed)
        if self.stream is not None:
            self.stream.sendall(data)
            return
        self._put(data)
        self.publish()

    def prepare(self, payload: bytes) -> None:
        """Write a good record into the ring, which `publish` lets the worker see."""
        self._put(self.record(payload))

    def publish(self) -> None:
        """Say how far the ring is written."""
        self.poke(self.calls, PRODUCER_WORD, self._position << 1)

    def take_back(self) -> None:
        """Fill the rest of the ring, but for a few calls, with records that are taken back."""
        start = PAGE + self._position
        count = (len(self.calls) - start) // CACHE_LINE - 64
        header = {"length": 0, "type": CALL, "flags": ABORTED, "epoch": self.epoch}
        data = b"".join(
            RECORD.pack(*header.values(), self.sequence + n).ljust(CACHE_LINE, b"\0")
            for n in range(count)
        )
        self.sequence += count
        self._put(data)

    def _put(self, data: bytes) -> None:
        start = PAGE + self._position
        self.calls[start : start + len(data)] = data
        self._position += -(-len(data) // CACHE_LINE) * CACHE_LINE

    @property
    def end_of_calls(self) -> int:
        """How far it has written, in bytes."""
        return self._position

    def poke(self, ring: mmap.mmap, offset: int, value: int) -> None:
        """Write a word of a control page at once; the worker looks there every 25 ms at least."""
        # struct.pack_into writes zeros first, which the worker may see.
        with memoryview(ring) as whole, whole.cast("Q") as words:
            words[offset // 8] = value

    def receive(self) -> bytes:
        """The next reply."""
        if self.stream is not None:
            (length, *_) = RECORD.unpack(self._exactly(RECORD.size))
            return self._exactly(length)
        while True:
            while self.bytes_of_replies() <= self._read_position:
                os.sched_yield()
            start = PAGE + self._read_position
            length, _, flags, _, _ = RECORD.unpack_from(self.replies, start)
            gap = 64 if length > 64 else 32
            self._read_position += -(-(gap + length) // 64) * 64
            self.poke(self.replies, CONSUMER_WORD, self._read_position << 1)
            if not flags & ABORTED:
                return self.replies[start + gap : start + gap + length]

    def bytes_of_replies(self) -> int:
        """How far the worker has written, in bytes."""
        (word,) = struct.unpack_from("<Q", self.replies, PRODUCER_WORD)
        return int(word >> 1 & ~63)

    def _exactly(self, size: int) -> bytes:
        assert self.stream is not None
        data = b""
        while len(data) < size:
            more = self.stream.recv(size - len(data))
            assert more, "the worker ended the stream"
            data += more
        return data

    def close(self) -> None:
        """Leave without a word."""
        self.control.close()
        if self.stream is not None:
            self.stream.close()
        for memory in (self.calls, self.replies, self.slab):
            memory.close()


@contextlib.contextmanager
def attacking(address: str, transport: str | None = None, slab: str = "") -> Iterator[Attacker]:
    """An attacker, with a session if a transport is named; it leaves at the end."""
    attacker = Attacker(address)
    try:
        if transport is not None:
            attacker.shake_hands(transport, slab)
        yield attacker
    finally:
        attacker.close()
