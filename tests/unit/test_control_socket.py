"""Addresses, and the socket that carries handshake messages and fds: nothing else gets through."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from moeshm import foreign_fds, handshake, session
from moeshm.errors import (
    ProtocolError,
    SessionError,
    SettingError,
)
from moeshm.foreign_fds import close_fds
from moeshm.handshake import Refusal, Welcome
from moeshm.session import ControlSocket
from tests.wire import (
    HELLO,
    LAST,
    MORE,
    PATIENCE_S,
    WHOLE,
    dense_info,
    meanwhile,
    n_fds,
    packets,
    with_fds,
)


@pytest.fixture
def sockets() -> Iterator[tuple[ControlSocket, socket.socket]]:
    """A control socket, and what may be anything at the other end."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control = ControlSocket(left)
    with right:
        yield control, right
    control.close()


# --- addresses ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/run/moeshm.sock", "relative", "a:b", "x" * 107, "é" * 53])
def test_an_address_is_unix_and_a_path(path: str) -> None:
    assert session.parse_address(f"unix:{path}") == path


@pytest.mark.parametrize(
    "bad",
    [
        *("", "unix", "unix:", "/run/x", "tcp:host:1", "UNIX:/x", "unix:" + "x" * 108),
        *("unix:" + "é" * 54, "unix:\0abstract", "unix:/a\0b"),
    ],
)
def test_anything_else_is_no_address(bad: str) -> None:
    with pytest.raises(SettingError) as caught:
        session.parse_address(bad)
    assert repr(bad.removeprefix("unix:")) in str(caught.value) or repr(bad) in str(caught.value)


# --- messages and fds ---------------------------------------------------------------------


def test_a_long_message_arrives_with_its_fds(
    sockets: tuple[ControlSocket, socket.socket],
) -> None:
    """A model with 58 layers of 256 experts; many packets, the fds with the first."""
    control, right = sockets
    layers = {number: dense_info(7168, 256, 8) for number in range(58)}
    welcome = Welcome(
        protocol=1, version="0.1", backend="null", transport="shared", stepped_down="",
        epoch=7, max_tokens=64, layers=layers,
    )  # fmt: skip
    other = ControlSocket(right.dup())
    with open("/dev/null", "rb") as null, open("/dev/zero", "rb") as zero:
        sent_fds = [null.fileno(), zero.fileno()]
        with meanwhile(lambda: other.send(welcome, sent_fds, PATIENCE_S)):
            message, fds = control.receive(PATIENCE_S)
    other.close()
    assert message == welcome
    assert [os.readlink(f"/proc/self/fd/{fd}") for fd in fds] == ["/dev/null", "/dev/zero"]
    assert not any(os.get_inheritable(fd) for fd in fds)
    close_fds(fds)
    assert fds == []


def test_the_peer_is_who_the_kernel_says(sockets: tuple[ControlSocket, socket.socket]) -> None:
    control, _ = sockets
    assert control.peer == (os.getpid(), os.geteuid(), os.getegid())
    assert control.peer_pid == os.getpid()
    assert control.peer_pidfd >= 0


def leave(sock: socket.socket) -> None:
    """Half a message, and away."""
    sock.send(MORE + b"\x84")
    sock.close()


@pytest.mark.parametrize(
    ("attack", "kind", "says"),
    [
        (packets(), SessionError, "did not come in time"),
        (packets(MORE + b"\x84"), SessionError, "did not come in time"),
        (leave, SessionError, "closed the connection"),
        (socket.socket.close, SessionError, "closed the connection"),
        (packets(b"GET / HTTP/1.1\r\n"), ProtocolError, "marked b'G' with 15 bytes"),
        (packets(b"\2" + WHOLE[1:]), ProtocolError, r"marked b'\\x02'"),
        (packets(LAST), ProtocolError, "no handshake message"),
        (packets(LAST + b"junk"), ProtocolError, "no handshake message"),
        (packets(MORE + b"junk", WHOLE), ProtocolError, "no handshake message"),
        (packets(b"\0" * 40_000), ProtocolError, "too long"),
        (packets(MORE + b"x" * 3000, MORE + b"x" * 3000), ProtocolError, "6000 bytes and 0 fds"),
        (packets(LAST + b"x" * 5000), ProtocolError, "at most 4096 bytes"),
        (with_fds((WHOLE, 5)), ProtocolError, "too many fds"),
        (with_fds((MORE, 3), (MORE, 2), (WHOLE, 0)), ProtocolError, "5 fds"),
        (with_fds((LAST + b"junk", 4)), ProtocolError, "no handshake message"),
        (with_fds((MORE, 4)), SessionError, "did not come in time"),
    ],
)
def test_a_broken_handshake_is_refused_and_its_fds_closed(
    sockets: tuple[ControlSocket, socket.socket],
    attack: Callable[[socket.socket], None],
    kind: type[Exception],
    says: str,
) -> None:
    control, right = sockets
    attack(right)
    before = n_fds()
    with pytest.raises(kind, match=says) as caught:
        control.receive(0.01, handshake.MAX_HELLO_BYTES)
    assert type(caught.value) is kind
    assert n_fds() == before


@pytest.mark.parametrize(
    "attack", [with_fds((WHOLE, 1)), with_fds((MORE, 0), (WHOLE, 4)), with_fds((WHOLE, 253))]
)
@pytest.mark.parametrize("resets", [False, True])
def test_a_worker_does_not_even_receive_fds(
    monkeypatch: pytest.MonkeyPatch, attack: Callable[[socket.socket], None], resets: bool
) -> None:
    """To close one may take as long as its sender likes."""

    def close(fds: list[int]) -> None:
        assert not fds, "fds came"

    monkeypatch.setattr(session, "close_fds", close)
    monkeypatch.setattr(foreign_fds, "close_fds", close)
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with right, contextlib.closing(ControlSocket(left, is_worker=True)) as control:
        attack(right)
        if resets:
            left.send(b"not read")
            right.close()
        before = n_fds()
        with pytest.raises(ProtocolError, match="carries fds; the worker takes none"):
            control.receive(PATIENCE_S, handshake.MAX_HELLO_BYTES)
        assert n_fds() == before


def test_who_sent_fds_with_a_hello_is_told_why_it_is_refused() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.closing(ControlSocket(right)) as client:
        with contextlib.closing(ControlSocket(left, is_worker=True)) as control:
            client.send(HELLO, [right.fileno()], PATIENCE_S)
            with pytest.raises(ProtocolError, match="carries fds"):
                session.accept(control, {4: dense_info(8, 4, 2)}, "null", 64, PATIENCE_S)
        message, _ = client.receive(PATIENCE_S)
        assert isinstance(message, Refusal)
        assert "send it without any" in message.reason
        with pytest.raises(SessionError, match="closed the connection"):
            client.receive(PATIENCE_S)


@pytest.mark.parametrize("size", [1, 1000, 40_000])
def test_a_worker_receives_messages_of_any_length_without_fds(size: int) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with (
        contextlib.closing(ControlSocket(right)) as client,
        contextlib.closing(ControlSocket(left, is_worker=True)) as control,
    ):
        client.send(Refusal("x" * size), [], PATIENCE_S)
        assert control.receive(PATIENCE_S) == (Refusal("x" * size), [])
        right.send(b"\0" * 40_000)
        with pytest.raises(ProtocolError, match="too long"):
            control.receive(PATIENCE_S)


def test_endless_packets_do_not_hold_a_handshake_open(
    sockets: tuple[ControlSocket, socket.socket],
) -> None:
    """Nobody waits for them, but the time is over all the same."""
    control, right = sockets
    packets(*[MORE] * 5, WHOLE)(right)
    with pytest.raises(SessionError, match="did not come in time"):
        control.receive(0.0)


def test_sending_to_who_is_gone_is_a_session_error(
    sockets: tuple[ControlSocket, socket.socket],
) -> None:
    control, right = sockets
    right.close()
    with pytest.raises(SessionError, match="could not be sent"):
        control.send(HELLO, [], 0.1)


def test_what_was_said_before_a_reset_is_heard(
    sockets: tuple[ControlSocket, socket.socket],
) -> None:
    """As by a worker that refuses a connection, and does not wait for its hello."""
    control, right = sockets
    control.send(HELLO, [], 0.1)
    right.send(LAST + handshake.encode_control(Refusal("not you")))
    right.close()
    message, _ = control.receive(0.1)
    assert message == Refusal("not you")
    with pytest.raises(SessionError, match="closed the connection"):
        control.receive(0.1)


def test_packets_that_are_taken_slowly_do_not_hold_a_sender(
    sockets: tuple[ControlSocket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is that of all packets together; each of these is taken just before it is over."""
    control, _ = sockets
    clock = [0.0]
    allowed: list[float] = []

    class SlowlyTaken:
        def settimeout(self, timeout_s: float) -> None:
            allowed.append(timeout_s)

        def close(self) -> None:
            """Nothing to close."""

    def take(*_: object) -> None:
        clock[0] += 0.9 * allowed[-1]

    whole = control._socket
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(socket, "send_fds", take)
    control._socket = SlowlyTaken()  # type: ignore[assignment]
    try:
        control.send(Refusal("x" * (1 << 20)), [], 5.0)
    finally:
        control._socket = whole
    assert len(allowed) > 30
    assert clock[0] < 5.1


def test_sending_to_who_never_reads_ends(sockets: tuple[ControlSocket, socket.socket]) -> None:
    control, _ = sockets
    with pytest.raises(SessionError, match="could not be sent"):
        control.send(Refusal("x" * (4 << 20)), [], 0.05)
