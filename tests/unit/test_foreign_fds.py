"""Fds that a peer sends along: none come where the kernel can refuse them; elsewhere, whatever they
are, they are closed, and nobody waits."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from moeshm import foreign_fds
from moeshm.transport.stream import StreamTransport
from tests.crash.processes import within
from tests.hostile.attacker import kernel_refuses_fds
from tests.hostile.attacks.lingering_sockets import lingering
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


def are_refused(by: socket.socket, sender: socket.socket) -> bool:
    """Whether fds that it is sent do not even leave; bytes do."""
    try:
        socket.send_fds(sender, [b"x"], [sender.fileno()])
    except PermissionError:
        sender.send(b"x")
        assert socket.recv_fds(by, 1, 1)[:2] == (b"x", [])
        return True
    foreign_fds.close_fds(foreign_fds.receive(by, 1)[1])
    return False


def test_who_refuses_fds_can_send_them(sockets: tuple[socket.socket, socket.socket]) -> None:
    left, right = sockets
    assert not are_refused(right, left)
    foreign_fds.refuse(right)
    assert are_refused(right, left) == kernel_refuses_fds()
    assert not are_refused(left, right)


def test_both_ends_of_a_stream_refuse_fds() -> None:
    worker, fds = StreamTransport.create(7)
    client = StreamTransport.attach(fds[0], 7)
    ends = worker._socket, client._socket
    try:
        for by, sender in (ends, ends[::-1]):
            assert are_refused(by, sender) == kernel_refuses_fds()
    finally:
        worker.close()
        client.close()


def test_a_worker_refuses_them_before_its_client_has_the_other_end() -> None:
    worker, fds = StreamTransport.create(7)
    with socket.socket(fileno=fds[0]) as client:
        assert are_refused(worker._socket, client) == kernel_refuses_fds()
    worker.close()


def test_a_kernel_that_cannot_refuse_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_fds, "_SO_PASSRIGHTS", 0x7FFF)
    left, right = socket.socketpair()
    with left, right:
        foreign_fds.refuse(right)
        assert not are_refused(right, left)


def test_a_socket_that_is_closed_does_not_linger() -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
        before = n_fds()
        fds = [os.dup(sock.fileno()), os.open("/dev/null", os.O_RDONLY), 1 << 20]
        foreign_fds.close_fds(fds)
        assert fds == []
        assert n_fds() == before
        assert not lingers(sock)


@pytest.mark.parametrize("is_hidden", [False, True])
@pytest.mark.parametrize("first", [b"said", b"", b"reset"])
def test_what_lies_unread_keeps_nobody_who_hangs_up(
    sockets: tuple[socket.socket, socket.socket], is_hidden: bool, first: bytes
) -> None:
    """However long it would linger, whatever comes before it, and if its sender hung up first."""
    left, right = sockets
    before = n_fds()
    left.send(first)
    with lingering(is_hidden) as fds:
        socket.send_fds(left, [b"x"], fds)
        while fds:
            os.close(fds.pop())
        if first == b"reset":
            right.send(b"not read")
            left.close()
        with within(10.0):
            foreign_fds.hang_up(right)
            foreign_fds.hang_up(right)
        left.close()
    assert n_fds() == before - 2


@pytest.mark.parametrize("lacks", ["close_range", "a thread"])
def test_where_no_thread_can_end_with_it_nothing_seen_lingers(
    sockets: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    """As many as a packet holds, in several packets, and the one who sends goes on."""

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    if lacks == "a thread":
        monkeypatch.setattr(threading.Thread, "start", fail)
    else:
        monkeypatch.setattr(foreign_fds, "_SYS_CLOSE_RANGE", 0xFFFF)
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


@pytest.mark.parametrize("refuses", [False, True])
def test_the_last_word_is_heard_by_who_was_not_listened_to(
    sockets: tuple[socket.socket, socket.socket], refuses: bool
) -> None:
    left, right = sockets
    if refuses:
        foreign_fds.refuse(right)
    for _ in range(3):
        left.send(b"said")
    right.send(b"no")
    foreign_fds.hang_up(right)
    assert left.recv(9) == b"no"
    assert left.recv(9) == b""


def test_where_none_can_come_no_thread_is_needed(
    sockets: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is every time that a client leaves."""
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def note(thread: threading.Thread) -> None:
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", note)
    left, right = sockets
    foreign_fds.refuse(right)
    left.send(b"said")
    foreign_fds.hang_up(right)
    assert bool(started) != kernel_refuses_fds()


def test_a_packet_and_its_fds(sockets: tuple[socket.socket, socket.socket]) -> None:
    left, right = sockets
    socket.send_fds(left, [b"abc"], [0] * 253)
    packet, fds, is_cut = foreign_fds.receive(right, 3)
    assert (packet, len(fds), is_cut) == (b"abc", 253, False)
    assert not any(map(os.get_inheritable, fds))
    foreign_fds.close_fds(fds)
    left.send(b"abcd")
    assert foreign_fds.receive(right, 3) == (b"abc", [], True)
