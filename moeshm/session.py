"""A session between two processes: the UNIX socket, the handshake, who the peer is, the end.

The socket stays open as long as the session: its hang-up, and the peer's pidfd, tell of a death.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import select
import socket
import time
from collections.abc import Callable, Mapping
from types import TracebackType

import msgspec

from . import access, foreign_fds, handshake, process, settings
from ._closing import close_socket
from ._version import VERSION
from .errors import (
    ConnectError,
    DeviceError,
    HandshakeRefused,
    InvalidCall,
    ProtocolError,
    SegmentError,
    SessionError,
    SettingError,
)
from .foreign_fds import close_fds
from .handshake import ControlMessage, Goodbye, Hello, Refusal, SlabOffer, SlabWish, Welcome
from .layers import LayerInfo
from .limits import Admission, Busy
from .printable import printable
from .sizes import fitting_tokens, ring_sizes, session_bytes, slab_bytes
from .transport import Transport
from .transport.shared import SharedTransport
from .transport.slab import Segment
from .transport.stream import StreamTransport

#: A packet of a handshake message: one byte that says whether more follow, and a part of it.
_PACKET_BYTES = 32 << 10
_MORE, _LAST = b"\1", b"\0"
_MAX_FDS = 4
_LATE = "the peer's part of the handshake did not come in time"
#: How long to sleep at a time, as in the ring: the system may give a signal to another thread, or
#: to this one right before it sleeps.
_SLICE_S = 0.025
#: That a client has to take the welcome, at least.
_WELCOME_S = 1.0
#: Characters of a refusal.
_MAX_REASON = 2000
#: Time to go through the queue of a listening worker, when it is full.
_CONNECT_PAUSE_S = 0.005
#: At most, before a busy worker is asked again.
_BUSY_PAUSE_S = 0.1
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
    """A connected SOCK_SEQPACKET socket that carries handshake messages and fds.

    `is_worker`: the peer is a client, of whom no fds are taken; the socket is this process's alone.
    """

    def __init__(self, sock: socket.socket, is_worker: bool = False) -> None:
        self._socket = sock
        self._is_worker = is_worker
        self.peer_pidfd = -1
        #: Who connected or listened, as the kernel says.
        self.peer = access.peer_of(sock)
        self.peer_pid = self.peer.pid
        self.peer_pidfd = process.open_pidfd(self.peer_pid)

    def fileno(self) -> int:
        """The socket's file descriptor; -1 once closed."""
        return self._socket.fileno()

    def send(self, message: ControlMessage, fds: list[int], timeout_s: float) -> None:
        """Send a message; the fds go with its first packet. SessionError when it cannot be."""
        data = handshake.encode_control(message)
        deadline = time.monotonic() + timeout_s
        try:
            for start in range(0, len(data), _PACKET_BYTES):
                # Of all packets together: a peer that takes them slowly is not waited for.
                self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
                part = data[start : start + _PACKET_BYTES]
                mark = _MORE if start + len(part) < len(data) else _LAST
                socket.send_fds(self._socket, [mark, part], fds if start == 0 else [])
        except OSError as error:
            raise SessionError(f"the handshake could not be sent: {error}") from error

    def refuse(self, error: Exception) -> None:
        """Tell the client why it gets no session, if it can be told at once."""
        with contextlib.suppress(SessionError):
            self.send(Refusal(str(error), isinstance(error, Busy)), [], 0.0)

    def receive(
        self, timeout_s: float, max_bytes: int = handshake.MAX_CONTROL_BYTES
    ) -> tuple[ControlMessage, list[int]]:
        """The next message and its fds, which are the caller's to close.

        SessionError: none came in time, or the peer is gone. ProtocolError: it is no message, or
        a longer one, or brings more fds than may come.
        """
        deadline = time.monotonic() + timeout_s
        data = bytearray()
        fds: list[int] = []
        try:
            while True:
                packet = self._receive_packet(fds, deadline)
                data += packet[1:]
                is_allowed = len(data) <= max_bytes and len(fds) <= _MAX_FDS
                if packet[:1] not in (_MORE, _LAST) or not is_allowed:
                    raise ProtocolError(
                        f"handshake packet marked {packet[:1]!r} with {len(data)} bytes and "
                        f"{len(fds)} fds so far; the mark must be 0 or 1, and at most {max_bytes} "
                        f"bytes and {_MAX_FDS} fds may come"
                    )
                if packet[:1] == _LAST:
                    return handshake.decode_control(bytes(data)), fds
                # Packets that are there already are received at any time.
                if time.monotonic() > deadline:
                    raise SessionError(_LATE)
        except BaseException:
            close_fds(fds)
            raise

    def _receive_packet(self, fds: list[int], deadline: float) -> bytes:
        try:
            packet, received, is_cut = self._receive(deadline)
        except TimeoutError:
            raise SessionError(_LATE) from None
        except OSError as error:
            raise SessionError(f"the peer is gone: {error}") from error
        fds += received
        if is_cut or len(received) > _MAX_FDS:
            raise ProtocolError("a handshake packet is too long, or carries too many fds")
        if not packet:
            raise SessionError("the peer closed the connection during the handshake")
        return packet

    def _receive(self, deadline: float) -> tuple[bytes, list[int], bool]:
        receive = foreign_fds.receive_without if self._is_worker else foreign_fds.receive
        while True:
            left_s = deadline - time.monotonic()
            self._socket.settimeout(min(max(1e-3, left_s), _SLICE_S))
            try:
                return receive(self._socket, _PACKET_BYTES + 1)
            except ConnectionResetError:
                # It hung up without reading all; what it had said before is there still.
                return receive(self._socket, _PACKET_BYTES + 1)
            except TimeoutError:
                if left_s <= _SLICE_S:
                    raise

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close it; again does nothing."""
        if self._is_worker:
            foreign_fds.hang_up(self._socket)
        # Forgotten first: an interrupt in between must not have another's fd closed.
        pidfd, self.peer_pidfd = self.peer_pidfd, -1
        close_socket(self._socket, False, pidfd)


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
        return printable(message.reason) if isinstance(message, Goodbye) else None

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
            fitting = fitting_tokens({number: info}, *capacities)
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

    ConnectError: nobody answers there, or another user's process (MOESHM_WORKER_USER).
    HandshakeRefused: the worker said no, with its reason; one that is busy is asked again until
    the timeout. ProtocolError, SegmentError: what it sent cannot be used.
    """
    deadline = time.monotonic() + timeout_s
    try:
        return _ask(address, transport, batch_capacity, placement, slab, deadline)
    except SegmentError as error:
        if transport != "auto":
            raise
        opened = _ask(address, "stream", batch_capacity, placement, _NO_WISH, deadline)
        opened.welcome = msgspec.structs.replace(opened.welcome, stepped_down=str(error))
        return opened


def _ask(
    address: str,
    transport: str,
    batch_capacity: int,
    placement: str,
    slab: SlabWish,
    deadline: float,
) -> Session:
    pause_s = _CONNECT_PAUSE_S
    while True:
        try:
            return _shake_hands(address, transport, batch_capacity, placement, slab, deadline)
        except Busy as error:
            if time.monotonic() + pause_s > deadline:
                raise HandshakeRefused(*error.args) from None
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _BUSY_PAUSE_S)


def _shake_hands(
    address: str,
    transport: str,
    batch_capacity: int,
    placement: str,
    slab: SlabWish,
    deadline: float,
) -> Session:
    path = parse_address(address)
    control = ControlSocket(_connect(path, deadline))
    try:
        access.check_worker(control.peer, path, settings.current().worker_user)
        hello = Hello(
            protocol=handshake.PROTOCOL_VERSION,
            version=VERSION,
            transport=transport,
            batch_capacity=batch_capacity,
            placement=placement,
            slab=slab.kind,
            vendor=slab.vendor,
        )
        # One that refuses a connection does not wait for the hello, and its reason is there.
        with contextlib.suppress(SessionError):
            control.send(hello, [], deadline - time.monotonic())
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
    except BaseException as error:
        sock.close()
        if isinstance(error, ConnectError) or not isinstance(error, OSError):
            raise
        raise ConnectError(
            f"no worker answers at {path} ({error.strerror}); start one with "
            f"moeshm worker --model DIR --listen unix:{path}"
        ) from None


def _join(
    control: ControlSocket, answer: ControlMessage, fds: list[int]
) -> tuple[Transport, Welcome, Segment | None]:
    if isinstance(answer, Refusal):
        kind = Busy if answer.is_busy else HandshakeRefused
        raise kind(f"the worker refused: {printable(answer.reason, _MAX_REASON)}")
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


def refuse(sock: socket.socket, error: HandshakeRefused) -> None:
    """Tell a client that is not let in why, without waiting for its hello, and hang up."""
    refusal = Refusal(str(error), isinstance(error, Busy))
    with contextlib.suppress(OSError):
        sock.setblocking(False)
        sock.send(_LAST + handshake.encode_control(refusal))
    foreign_fds.hang_up(sock)


def accept(
    control: ControlSocket,
    layers: Mapping[int, LayerInfo],
    backend: str,
    max_tokens: int,
    timeout_s: float,
    offer_slab: OfferSlab = _offer_none,
    admission: Admission | None = None,
) -> Session:
    """Answer a client's handshake, all of which may take `timeout_s`. `admission`: what the session
    may take; None for any.

    HandshakeRefused, ProtocolError, SegmentError: there is no session, and the client was told.
    SessionError: it did not say hello in time, or is gone.
    """
    deadline = time.monotonic() + timeout_s
    try:
        # First: who closes with something unread resets the connection.
        message, fds = control.receive(timeout_s, handshake.MAX_HELLO_BYTES)
        close_fds(fds)
        hello = handshake.check_hello(message)
        handshake.check_placement(hello, layers)
        most = min(max_tokens, hello.batch_capacity)
        return _open(control, hello, layers, backend, most, deadline, offer_slab, admission)
    except (HandshakeRefused, ProtocolError, SegmentError) as error:
        control.refuse(error)
        raise


def _open(
    control: ControlSocket,
    hello: Hello,
    layers: Mapping[int, LayerInfo],
    backend: str,
    max_tokens: int,
    deadline: float,
    offer_slab: OfferSlab,
    admission: Admission | None,
) -> Session:
    epoch = random.SystemRandom().getrandbits(64)
    if admission is not None:
        wish = layers, hello.transport, bool(hello.slab)
        max_tokens = admission.take_bytes(max_tokens, functools.partial(session_bytes, *wish))
    sizes = ring_sizes(layers, max_tokens)
    max_tokens = min(max_tokens, fitting_tokens(layers, *sizes))
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
        if admission is not None:
            admission.has_shaken_hands()
        # Making a slab may have taken the time that there was.
        control.send(welcome, fds + slab_fds, max(_WELCOME_S, deadline - time.monotonic()))
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
    try:
        offer, fd, why = offer_slab(hello, slab_bytes(call_bytes))
    except (SegmentError, DeviceError) as error:
        return None, str(error)
    fds.append(fd)
    return offer, why
