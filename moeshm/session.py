"""A session between two processes: the UNIX socket, the handshake, who the peer is, the end.

The socket stays open as long as the session: its hang-up, and the peer's pidfd, tell of a death.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping
from types import TracebackType

import msgspec
import numpy as np

from . import handshake, process, protocol
from ._version import VERSION
from .dtypes import DType
from .errors import (
    ConnectError,
    DeviceError,
    HandshakeRefused,
    InvalidCall,
    MoeshmError,
    ProtocolError,
    SegmentError,
    SessionError,
    SettingError,
)
from .handshake import ControlMessage, Goodbye, Hello, Refusal, SlabOffer, SlabWish, Welcome
from .layers import LayerInfo
from .orders import MAX_ANSWER_BYTES, MAX_ORDER_BYTES
from .transport import Transport
from .transport.shared import SharedTransport
from .transport.slab import PAGE_BYTES, Segment
from .transport.stream import StreamTransport

#: A packet of a handshake message: one byte that says whether more follow, and a part of it.
_PACKET_BYTES = 32 << 10
_MORE, _LAST = b"\1", b"\0"
_MAX_FDS = 4
_LATE = "the peer's part of the handshake did not come in time"
_FD = np.dtype(np.intc)
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred of unix(7)
#: Rings are made no larger than this; longer calls are cut.
MAX_RING_BYTES = 64 << 20
#: Time to go through the queue of a listening worker, when it is full.
_CONNECT_PAUSE_S = 0.005
#: Of the largest call's arrays, how many a slab has room for: while one is computed, the next is
#: put there.
_SLAB_CALLS = 2
_NO_WISH = SlabWish()

#: `(hello, data bytes)`: makes the slab that a client wishes for; with the fd of its segment, which
#: is the caller's to close, and why it is not better than it is.
OfferSlab = Callable[[Hello, int], tuple[SlabOffer, int, str]]


def parse_address(address: str) -> str:
    """The path of `unix:PATH`; SettingError for anything else."""
    scheme, colon, path = address.partition(":")
    if scheme != "unix" or not colon or not path:
        raise SettingError(f"address {address!r}; write unix:PATH")
    if "\0" in path:
        raise SettingError(f"the socket path {path!r} holds a zero byte; write a plain path")
    if len(os.fsencode(path)) > 107:
        raise SettingError(f"the socket path {path!r} is longer than 107 bytes; choose another")
    return path


class ControlSocket:
    """A connected SOCK_SEQPACKET socket that carries handshake messages and fds."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.peer_pidfd = -1
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        #: Of the process that connected or listened, as the kernel says.
        self.peer_pid, self.peer_uid, self.peer_gid = _CREDENTIALS.unpack(credentials)
        self.peer_pidfd = process.open_pidfd(self.peer_pid)

    def fileno(self) -> int:
        """The socket's file descriptor; -1 once closed."""
        return self._socket.fileno()

    def send(self, message: ControlMessage, fds: list[int], timeout_s: float) -> None:
        """Send a message; the fds go with its first packet. SessionError when it cannot be."""
        data = handshake.encode_control(message)
        self._socket.settimeout(timeout_s)
        try:
            for start in range(0, len(data), _PACKET_BYTES):
                part = data[start : start + _PACKET_BYTES]
                mark = _MORE if start + len(part) < len(data) else _LAST
                socket.send_fds(self._socket, [mark, part], fds if start == 0 else [])
        except OSError as error:
            raise SessionError(f"the handshake could not be sent: {error}") from error

    def receive(
        self, timeout_s: float, max_bytes: int = handshake.MAX_CONTROL_BYTES
    ) -> tuple[ControlMessage, list[int]]:
        """The next message and its fds, which are the caller's to close.

        SessionError: none came in time, or the peer is gone. ProtocolError: it is no message, or
        a longer one.
        """
        deadline = time.monotonic() + timeout_s
        data = bytearray()
        fds: list[int] = []
        try:
            while True:
                packet = self._receive_packet(fds, deadline - time.monotonic())
                data += packet[1:]
                is_allowed = len(data) <= max_bytes and len(fds) <= _MAX_FDS
                if packet[:1] not in (_MORE, _LAST) or not is_allowed:
                    raise ProtocolError(
                        f"handshake packet {packet[:16]!r}, {len(data)} bytes and {len(fds)} fds "
                        f"so far; at most {max_bytes} bytes and {_MAX_FDS} fds may come"
                    )
                if packet[:1] == _LAST:
                    return handshake.decode_control(bytes(data)), fds
                # Packets that are there already are received at any time.
                if time.monotonic() > deadline:
                    raise SessionError(_LATE)
        except BaseException:
            close_fds(fds)
            raise

    def _receive_packet(self, fds: list[int], timeout_s: float) -> bytes:
        self._socket.settimeout(max(1e-3, timeout_s))
        try:
            # socket.recv_fds ignores its flags: children would inherit the fds.
            packet, ancillary, flags, _ = self._socket.recvmsg(
                _PACKET_BYTES + 1,
                socket.CMSG_LEN(_MAX_FDS * _FD.itemsize),
                socket.MSG_CMSG_CLOEXEC,
            )
        except TimeoutError:
            raise SessionError(_LATE) from None
        except OSError as error:
            raise SessionError(f"the peer is gone: {error}") from error
        for level, kind, numbers in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds += np.frombuffer(numbers, _FD, len(numbers) // _FD.itemsize).tolist()
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ProtocolError("a handshake packet is too long, or carries too many fds")
        if not packet:
            raise SessionError("the peer closed the connection during the handshake")
        return packet

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close it; again does nothing."""
        self._socket.close()
        if self.peer_pidfd >= 0:
            os.close(self.peer_pidfd)
            self.peer_pidfd = -1


class Session:
    """An open session: the transport, and what keeps it alive."""

    def __init__(
        self,
        control: ControlSocket,
        transport: Transport,
        welcome: Welcome,
        slab: Segment | None = None,
    ) -> None:
        self.control = control
        self.transport = transport
        self.welcome = welcome
        #: On the client's side, if the welcome has one.
        self.slab = slab

    def farewell(self) -> str | None:
        """Why the peer ended the session on purpose; None when it did not say so."""
        try:
            message, fds = self.control.receive(0.0)
        except (SessionError, OSError):
            return None
        close_fds(fds)
        return message.reason if isinstance(message, Goodbye) else None

    def peer_is_gone(self) -> bool:
        """True when the other process ended or hung up, whatever it sent before."""
        poll = select.poll()
        poll.register(self.control.fileno(), 0)
        if self.control.peer_pidfd >= 0:
            poll.register(self.control.peer_pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def check_layers(self, layers: Mapping[int, LayerInfo]) -> None:
        """InvalidCall unless the longest call of each, as welcomed, fits; on the worker's side."""
        most = self.welcome.max_tokens
        capacities = self.transport.receive_capacity, self.transport.send_capacity
        for number, info in layers.items():
            fitting = _fitting_tokens({number: info}, *capacities)
            if fitting < most:
                raise InvalidCall(
                    f"layer {number} is wider than those of the welcome: of {most} tokens in a "
                    f"call {fitting} fit; open a session anew"
                )

    def close(self) -> None:
        """Close all; again does nothing. A slab stays mapped for whoever uses it still."""
        self.transport.close()
        self.control.close()
        if self.slab is not None:
            self.slab.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


# --- client -------------------------------------------------------------------------------


def connect(
    address: str,
    transport: str,
    batch_capacity: int,
    timeout_s: float,
    placement: str = "",
    slab: SlabWish = _NO_WISH,
) -> Session:
    """Open a session with the worker at `unix:PATH`; `auto` steps down to the stream transport
    when this process cannot map the rings. `placement`: as `Hello.placement`.

    ConnectError: nobody answers there. HandshakeRefused: the worker said no, with its reason.
    ProtocolError, SegmentError: what it sent cannot be used.
    """
    deadline = time.monotonic() + timeout_s
    try:
        return _shake_hands(address, transport, batch_capacity, placement, slab, deadline)
    except SegmentError as error:
        if transport != "auto":
            raise
        opened = _shake_hands(address, "stream", batch_capacity, placement, _NO_WISH, deadline)
        opened.welcome = msgspec.structs.replace(opened.welcome, stepped_down=str(error))
        return opened


def _shake_hands(
    address: str,
    transport: str,
    batch_capacity: int,
    placement: str,
    slab: SlabWish,
    deadline: float,
) -> Session:
    control = ControlSocket(_connect(parse_address(address), deadline))
    try:
        hello = Hello(
            protocol=handshake.PROTOCOL_VERSION,
            version=VERSION,
            transport=transport,
            batch_capacity=batch_capacity,
            placement=placement,
            slab=slab.kind,
            vendor=slab.vendor,
        )
        control.send(hello, [], max(1e-3, deadline - time.monotonic()))
        answer, fds = control.receive(deadline - time.monotonic())
        try:
            return Session(control, *_join(control, answer, fds))
        finally:
            close_fds(fds)
    except BaseException:
        control.close()
        raise


def _connect(path: str, deadline: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.setblocking(False)
    try:
        while True:
            try:
                sock.connect(path)
                return sock
            except BlockingIOError:
                # The worker's queue is full, and a UNIX socket cannot be polled for room in it.
                if time.monotonic() > deadline:
                    raise ConnectError(f"the worker at {path} is too busy to answer") from None
                time.sleep(_CONNECT_PAUSE_S)
    except OSError as error:
        sock.close()
        if isinstance(error, ConnectError):
            raise
        raise ConnectError(
            f"no worker answers at {path} ({error.strerror}); start one with "
            f"moeshm worker --model DIR --listen unix:{path}"
        ) from None


def _join(
    control: ControlSocket, answer: ControlMessage, fds: list[int]
) -> tuple[Transport, Welcome, Segment | None]:
    if isinstance(answer, Refusal):
        raise HandshakeRefused(f"the worker refused: {answer.reason}")
    if not isinstance(answer, Welcome):
        raise ProtocolError(f"expected welcome, got {type(answer).__name__.lower()}")
    welcome = handshake.check_welcome(answer, len(fds))
    offer = welcome.slab
    slab = None
    if offer is not None:
        slab = Segment.attach(fds[-1], 0 if offer.handle else offer.data_bytes)
        os.close(fds.pop())
    if welcome.transport == "stream":
        stream = StreamTransport.attach(fds.pop(), welcome.epoch, control.peer_pidfd)
        return stream, welcome, slab
    shared = SharedTransport.attach(fds, welcome.epoch, control.fileno(), control.peer_pidfd)
    return shared, welcome, slab


# --- worker -------------------------------------------------------------------------------


def _offer_none(_hello: Hello, _data_bytes: int) -> tuple[SlabOffer, int, str]:
    raise DeviceError("this worker gives none")


def accept(
    control: ControlSocket,
    layers: Mapping[int, LayerInfo],
    backend: str,
    max_tokens: int,
    timeout_s: float,
    offer_slab: OfferSlab = _offer_none,
) -> Session:
    """Answer a client's handshake; it is told before a ProtocolError or SegmentError is raised."""
    try:
        # First: who closes with something unread resets the connection, and its refusal is lost.
        message, fds = control.receive(timeout_s, handshake.MAX_HELLO_BYTES)
        close_fds(fds)
        if control.peer_uid not in (os.geteuid(), 0):
            raise ProtocolError(f"user {control.peer_uid} may not use this worker")
        hello = handshake.check_hello(message)
        handshake.check_placement(hello, layers)
        most = min(max_tokens, hello.batch_capacity)
        return _open(control, hello, layers, backend, most, timeout_s, offer_slab)
    except (ProtocolError, SegmentError) as error:
        with contextlib.suppress(MoeshmError):
            control.send(Refusal(str(error)), [], timeout_s)
        raise


def _open(
    control: ControlSocket,
    hello: Hello,
    layers: Mapping[int, LayerInfo],
    backend: str,
    max_tokens: int,
    timeout_s: float,
    offer_slab: OfferSlab,
) -> Session:
    epoch = random.SystemRandom().getrandbits(64)
    sizes = _ring_sizes(layers, max_tokens)
    max_tokens = min(max_tokens, _fitting_tokens(layers, *sizes))
    stepped_down = ""
    transport: Transport
    if hello.transport == "stream":
        transport, fds = StreamTransport.create(epoch, control.peer_pidfd, sizes[0])
    else:
        try:
            transport, fds = SharedTransport.create(
                *sizes, epoch, control.fileno(), control.peer_pidfd
            )
        except SegmentError as error:
            if hello.transport == "shared":
                raise
            stepped_down = str(error)
            transport, fds = StreamTransport.create(epoch, control.peer_pidfd, sizes[0])
    slab_fds: list[int] = []
    try:
        slab, refused = _offer(hello, sum(sizes), offer_slab, slab_fds)
        welcome = Welcome(
            protocol=handshake.PROTOCOL_VERSION,
            version=VERSION,
            backend=backend,
            transport=transport.name,
            stepped_down=stepped_down,
            epoch=epoch,
            max_tokens=max_tokens,
            layers=dict(layers),
            takes_orders=True,
            slab=slab,
            slab_refused=refused,
        )
        control.send(welcome, fds + slab_fds, timeout_s)
    except BaseException:
        transport.close()
        raise
    finally:
        close_fds(slab_fds)
        if transport.name == "stream":
            close_fds(fds)
    return Session(control, transport, welcome)


def _offer(
    hello: Hello, call_bytes: int, offer_slab: OfferSlab, fds: list[int]
) -> tuple[SlabOffer | None, str]:
    """The slab that the client asked for, whose fd is added, or why it gets none."""
    if not hello.slab:
        return None, ""
    n_bytes = min(_SLAB_CALLS * call_bytes, MAX_RING_BYTES)
    try:
        offer, fd, why = offer_slab(hello, -(-n_bytes // PAGE_BYTES) * PAGE_BYTES)
    except (SegmentError, DeviceError) as error:
        return None, str(error)
    fds.append(fd)
    return offer, why


def _call_sizes(info: LayerInfo, max_tokens: int) -> tuple[int, int]:
    """Bytes of a call and of its reply in the widest format."""
    rows = protocol.reply_bytes(max_tokens, info.hidden_size, DType.F32)
    return rows + max_tokens * info.top_k * 8 + protocol.HEADER_BYTES, rows


def _ring_sizes(layers: Mapping[int, LayerInfo], max_tokens: int) -> tuple[int, int]:
    """Capacities for calls and for replies: what the largest call of any layer takes, or an
    order."""
    sizes = [_call_sizes(info, max_tokens) for info in layers.values()]
    calls, replies = (max(each) for each in zip(*sizes, strict=True))
    calls, replies = max(calls, MAX_ORDER_BYTES), max(replies, MAX_ANSWER_BYTES)
    return min(calls, MAX_RING_BYTES), min(replies, MAX_RING_BYTES)


def _fitting_tokens(layers: Mapping[int, LayerInfo], calls: int, replies: int) -> int:
    """Most tokens whose call and reply fit for every layer."""
    fitting = protocol.MAX_TOKENS
    for info in layers.values():
        row = 4 * info.hidden_size
        by_call = (calls - 2 * protocol.HEADER_BYTES) // (row + 8 * info.top_k)
        by_reply = (replies - protocol.HEADER_BYTES) // row
        fitting = min(fitting, by_call, by_reply)
    return max(1, fitting)


def close_fds(fds: list[int]) -> None:
    """Close and forget them."""
    while fds:
        try:
            os.close(fds.pop())
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
