"""Fds that a peer sends along: whatever they are, they are closed, and nobody waits."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from moeshm import foreign_fds
from tests.wire import n_fds

_LINGER = struct.pack("ii", 1, 300)


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        yield left, right


def lingers(sock: socket.socket) -> int:
    """Whether closing it may wait."""
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
    return int(struct.unpack("ii", found)[0])


def test_a_socket_that_is_closed_does_not_linger() -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
        before = n_fds()
        fds = [os.dup(sock.fileno()), os.open("/dev/null", os.O_RDONLY), 1 << 20]
        foreign_fds.close_fds(fds)
        assert fds == []
        assert n_fds() == before
        assert not lingers(sock)


def test_nor_does_what_lies_unread(sockets: tuple[socket.socket, socket.socket]) -> None:
    """As many as a packet holds, in several packets, and the one who sends goes on."""
    left, right = sockets
    before = n_fds()
    with contextlib.ExitStack() as stack:
        sent = [stack.enter_context(socket.socket()) for _ in range(3)]
        for sock in sent:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
            socket.send_fds(left, [b"long enough"], [sock.fileno()] * 253)
        right.settimeout(30.0)
        foreign_fds.hang_up(right)
        assert not any(map(lingers, sent))
        with pytest.raises(BrokenPipeError):
            left.send(b"more")
        foreign_fds.hang_up(right)
    assert n_fds() == before - 1


def test_a_packet_and_its_fds(sockets: tuple[socket.socket, socket.socket]) -> None:
    left, right = sockets
    socket.send_fds(left, [b"abc"], [0] * 253)
    packet, fds, is_cut = foreign_fds.receive(right, 3)
    assert (packet, len(fds), is_cut) == (b"abc", 253, False)
    assert not any(map(os.get_inheritable, fds))
    foreign_fds.close_fds(fds)
    left.send(b"abcd")
    assert foreign_fds.receive(right, 3) == (b"abc", [], True)
