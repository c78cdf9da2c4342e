"""What every transport promises, run against each: whole records, in order, or a clear error."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import signal
import socket
import struct
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from moeshm import protocol, session
from moeshm.dtypes import DType
from moeshm.errors import (
    Corrupt,
    PeerDied,
    RingClosed,
    RingEmpty,
    RingError,
    RingFull,
)
from moeshm.session import ControlSocket
from moeshm.transport import Transport
from moeshm.transport.stream import StreamTransport
from tests.crash.processes import running
from tests.wire import CAPACITY, Ends, connected, dense_info, meanwhile, pattern, send, take

NAMES = ["shared", "stream"]
MIB = 1 << 20
#: Around a cache line, a page, the size where copies let go of the GIL, a socket's buffer.
SIZES = [0, 1, 31, 32, 63, 64, 65, 4095, 4096, 65537, MIB, 3 * MIB + 1]
#: A stream cannot tell one from the other.
GONE = (RingClosed, PeerDied)


@pytest.fixture(params=NAMES)
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """Both ends."""
    with connected(request.param) as both:
        assert both.client.name == both.worker.name == request.param
        yield both


@pytest.fixture(params=["to worker", "to client"])
def way(request: pytest.FixtureRequest, ends: Ends) -> tuple[Transport, Transport]:
    """Who sends, and who receives."""
    client, worker = ends
    return (client, worker) if request.param == "to worker" else (worker, client)


# --- records ------------------------------------------------------------------------------


def test_records_of_every_size_arrive_in_order(way: tuple[Transport, Transport]) -> None:
    sender, receiver = way
    sizes = [*SIZES, *reversed(SIZES)]
    with meanwhile(lambda: send(sender, ((n % 251, pattern(n, 1)) for n in sizes))):
        for n in sizes:
            assert take(receiver) == (n % 251, pattern(n, 1))


def test_types_and_flags_arrive(way: tuple[Transport, Transport]) -> None:
    sender, receiver = way
    for kind, flags in ((0, 0), (1, 0), (2**32 - 1, 2**31 - 1), (7, 1)):
        sender.write((b"x",), kind, flags)
        record: Any = receiver.acquire(0.0)
        assert (record.type, record.flags) == (kind, flags)
        record.release()


def test_parts_arrive_as_one_record(way: tuple[Transport, Transport]) -> None:
    sender, receiver = way
    parts = [
        b"bytes",
        b"",
        bytearray(b"bytearray"),
        memoryview(b"memoryview")[3:],
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(6, dtype=np.float16).reshape(3, 2),
        np.arange(3, dtype=np.uint16),
        np.full((2, 2), -1, np.int32),
    ]
    sender.write(parts, 3)
    assert take(receiver) == (3, b"".join(bytes(part) for part in parts))


def test_an_empty_record_arrives(way: tuple[Transport, Transport]) -> None:
    sender, receiver = way
    sender.write((), 5)
    sender.reserve(0, 6).commit()
    assert take(receiver) == (5, b"")
    assert take(receiver) == (6, b"")


def test_a_record_is_read_in_place(way: tuple[Transport, Transport]) -> None:
    sender, receiver = way
    sent = np.arange(64, dtype=np.float32)
    sender.write((b"h" * 64, sent), 1)
    record = receiver.acquire(0.0)
    assert len(record) == 64 + sent.nbytes
    got = record.array(np.float32, (8, 8), 64)
    np.testing.assert_array_equal(got, sent.reshape(8, 8))
    into = np.empty((4, 8), np.float32)
    record.copy_to(into, 64 + 4 * 8)
    np.testing.assert_array_equal(into.ravel(), sent[8:40])
    with pytest.raises(ValueError, match="65"):
        record.copy_to(np.empty(sent.nbytes, np.uint8), 65)
    for shape, offset in (((65,), 64), ((8, 9), 64), ((1,), 64 + sent.nbytes)):
        with pytest.raises(ValueError):  # noqa: PT011 (each in its own words)
            record.array(np.float32, shape, offset)
    del got
    record.release()


def test_a_reservation_is_filled_in_place(way: tuple[Transport, Transport]) -> None:
    sender, receiver = way
    reservation = sender.reserve(64 + 48, 9)
    assert len(reservation) == 112
    struct.pack_into("<Q", cast("Any", reservation), 0, 77)
    rows = reservation.array(np.float32, (3, 4), 64)
    rows[...] = np.arange(12).reshape(3, 4)
    del rows
    reservation.commit()
    kind, data = take(receiver)
    assert (kind, data[:8]) == (9, struct.pack("<Q", 77))
    np.testing.assert_array_equal(np.frombuffer(data, np.float32, 12, 64), np.arange(12))


def test_an_aborted_reservation_is_never_seen(way: tuple[Transport, Transport]) -> None:
    sender, receiver = way
    sender.write((b"before",), 1)
    sender.reserve(100, 2).abort()
    sender.write((b"after",), 3)
    assert take(receiver) == (1, b"before")
    assert take(receiver) == (3, b"after")
    with pytest.raises(RingEmpty):
        receiver.acquire(0.0)


def test_a_reservation_ends_once(way: tuple[Transport, Transport]) -> None:
    sender, receiver = way
    committed = sender.reserve(1, 1)
    committed.commit()
    aborted = sender.reserve(1, 2)
    aborted.abort()
    for reservation in (committed, aborted):
        for end in (reservation.commit, reservation.abort):
            with pytest.raises(RingError, match="already"):
                end()
    assert take(receiver)[0] == 1
    with pytest.raises(RingEmpty):
        receiver.acquire(0.0)


def test_a_record_beyond_the_capacity_is_refused(way: tuple[Transport, Transport]) -> None:
    sender, receiver = way
    too_much = sender.send_capacity + 1
    # Never touched, so that it takes no memory.
    with pytest.raises(RingError, match=str(too_much)):
        sender.write((np.empty(too_much, np.uint8),), 1)
    with pytest.raises(RingError, match=str(too_much)):
        sender.reserve(too_much, 1)
    sender.write((b"fine",), 1)
    assert take(receiver) == (1, b"fine")


def test_a_record_may_fill_the_capacity() -> None:
    with connected("shared") as (client, worker):
        assert client.send_capacity == worker.receive_capacity == CAPACITY
        data = pattern(CAPACITY)
        for _ in range(3):
            client.write((data,), 1)
            assert take(worker) == (1, data)


# --- waiting ------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout_s", [0.0, 0.01, -1.0])
def test_nothing_comes(way: tuple[Transport, Transport], timeout_s: float) -> None:
    sender, receiver = way
    for _ in range(2):
        with pytest.raises(RingEmpty):
            receiver.acquire(timeout_s)
    sender.write((b"late",), 1)
    assert take(receiver, timeout_s) == (1, b"late")


@pytest.mark.parametrize("timeout_s", [0.0, 0.01])
def test_what_finds_no_room_is_not_sent(way: tuple[Transport, Transport], timeout_s: float) -> None:
    sender, receiver = way
    # So small that each leaves as a whole or not at all.
    n_sent = 0
    with contextlib.suppress(RingFull):
        while True:
            sender.write((pattern(20_000, n_sent),), n_sent, 0, timeout_s)
            n_sent += 1
    assert n_sent > 3
    with pytest.raises(RingFull, match="no room for"):
        sender.write((b"x" * 20_000,), 0, 0, timeout_s)
    for n in range(n_sent):
        assert take(receiver) == (n, pattern(20_000, n))
    with pytest.raises(RingEmpty):
        receiver.acquire(0.0)
    sender.write((b"again",), 1, 0, timeout_s)
    assert take(receiver) == (1, b"again")


def test_who_waits_for_room_gets_it(way: tuple[Transport, Transport]) -> None:
    sender, receiver = way
    n = 60
    with meanwhile(lambda: send(sender, ((i, pattern(200_000, i)) for i in range(n)))):
        for i in range(n):
            assert take(receiver) == (i, pattern(200_000, i))


def test_large_records_cross(ends: Ends) -> None:
    """A client takes in what comes while it waits for room, and then nobody waits for ever."""
    n, data = 12, pattern(MIB)
    answers: list[tuple[int, bytes]] = []

    def echo() -> None:
        for _ in range(n):
            record = ends.worker.acquire()
            ends.worker.write((memoryview(record),), record.type)
            record.release()

    def take_in() -> None:
        try:
            while True:
                answers.append(take(ends.client, 0.0))
        except RingEmpty:
            return

    with meanwhile(echo):
        for i in range(n):
            while True:
                try:
                    ends.client.write((data,), i, 0, 0.001)
                    break
                except RingFull:
                    take_in()
        while len(answers) < n:
            answers.append(take(ends.client))
    assert answers == [(i, data) for i in range(n)]


def test_a_stream_client_takes_in_while_it_sends() -> None:
    n, data = 3, pattern(3 * MIB)
    with connected("stream") as (client, worker):

        def send_then_receive() -> None:
            for i in range(n):
                worker.write((data,), 10 + i)
            for i in range(n):
                assert take(worker) == (i, data)

        with meanwhile(send_then_receive):
            for i in range(n):
                client.write((data,), i)
            for i in range(n):
                assert take(client) == (10 + i, data)


def test_one_thread_sends_while_another_receives(ends: Ends) -> None:
    n, data = 20, pattern(MIB + 3)

    def echo() -> None:
        for _ in range(n):
            kind, got = take(ends.worker)
            ends.worker.write((got,), kind)

    def receive() -> None:
        for i in range(n):
            assert take(ends.client) == (i, data)

    with meanwhile(echo, receive):
        for i in range(n):
            ends.client.write((data,), i)


# --- the end ------------------------------------------------------------------------------


def test_what_was_sent_before_the_close_is_read_first(way: tuple[Transport, Transport]) -> None:
    sender, receiver = way
    for i in range(5):
        sender.write((pattern(1000, i),), i)
    sender.close()
    for i in range(5):
        assert take(receiver) == (i, pattern(1000, i))
    for _ in range(2):
        for timeout_s in (0.0, None):
            with pytest.raises(GONE):
                receiver.acquire(timeout_s)
    with pytest.raises(GONE):
        receiver.write((b"x",), 1)


def test_a_closed_end_is_closed(way: tuple[Transport, Transport]) -> None:
    sender, _ = way
    reservation = sender.reserve(10, 1)
    sender.close()
    sender.close()
    with pytest.raises(RingClosed):
        sender.acquire(0.0)
    with pytest.raises(RingClosed):
        sender.write((b"x",), 1)
    with pytest.raises(RingClosed):
        reservation.commit()
    reservation.abort()


def test_a_close_wakes_who_waits_at_the_same_end(way: tuple[Transport, Transport]) -> None:
    _, receiver = way

    def wait() -> None:
        with pytest.raises(RingClosed):
            receiver.acquire()

    with meanwhile(wait):
        receiver.close()


def test_a_close_wakes_who_waits_at_the_other_end(way: tuple[Transport, Transport]) -> None:
    sender, receiver = way

    def wait() -> None:
        with pytest.raises(GONE):
            receiver.acquire()

    with meanwhile(wait):
        sender.close()


def test_a_close_wakes_who_waits_for_room(way: tuple[Transport, Transport]) -> None:
    sender, receiver = way

    def flood() -> None:
        with pytest.raises(GONE):
            send(sender, itertools.repeat((1, bytes(MIB))))

    with meanwhile(flood):
        take(receiver)
        receiver.close()


#: Sends two records, says so, and waits.
PEER = """
import sys
from moeshm import session
opened = session.connect(sys.argv[1], sys.argv[2], 4, 30.0)
for i in range(2):
    opened.transport.write((bytes([i]) * 1000,), i)
print("sent", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_waiting", [False, True])
def test_what_was_sent_before_a_death_is_read_first(
    tmp_path: Any, name: str, is_waiting: bool
) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        with running(["-c", PEER, f"unix:{path}", name]) as peer:
            control = ControlSocket(listener.accept()[0])
            with session.accept(control, {0: dense_info(64, 4, 2)}, "null", 4, 30.0) as opened:
                peer.output.read_until("sent")
                assert opened.transport.name == name

                def read() -> None:
                    for i in range(2):
                        assert take(opened.transport) == (i, bytes([i]) * 1000)
                    with pytest.raises(PeerDied):
                        opened.transport.acquire()

                if is_waiting:
                    with meanwhile(read):
                        os.kill(peer.pid, signal.SIGKILL)
                else:
                    peer.kill()
                    read()
                with pytest.raises(GONE):
                    send(opened.transport, itertools.repeat((1, bytes(1000))))


def test_a_calls_deadline_is_of_no_other_record() -> None:
    """What is longer than the socket's buffers leaves as its receiver takes it in."""
    with connected("stream") as (client, worker):
        rows = np.zeros((1, 4), np.float32)
        slots = np.zeros((1, 1))
        client.write_call(
            1, 0, rows, slots.astype(np.int32), slots.astype(np.float32), DType.F32, 1
        )
        order = pattern(16 * MIB)
        with meanwhile(lambda: client.write((order,), protocol.ORDER)):
            take(worker)
            assert take(worker) == (protocol.ORDER, order)


# --- impossible records -------------------------------------------------------------------

#: Of a record's header: where the field lies, its form, and a value that cannot be.
IMPOSSIBLE = {
    "length beyond what came": (0, "<Q", 1 << 40),
    "length of all ones": (0, "<Q", (1 << 64) - 1),
    "an old epoch": (16, "<Q", 0xE60B),
    "a sequence again": (24, "<Q", 0),
    "a sequence ahead": (24, "<Q", 2),
}


def forge(name: str, ends: Ends, field: str) -> None:
    """As the client, send a good record and then one with an impossible header."""
    offset, kind, value = IMPOSSIBLE[field]
    client: Any = ends.client
    client.write((b"good",), 1)
    if name == "shared":
        client.write((b"evil",), 1)
        fd = client._tx.fileno()
        with mmap.mmap(fd, os.fstat(fd).st_size) as memory:
            # After the control page, and the first record of one cache line.
            struct.pack_into(kind, memory, 4096 + 64 + offset, value)
    else:
        header = bytearray(struct.pack("<QIIQQ", 4, 1, 0, 0xE60C, 1))
        struct.pack_into(kind, header, offset, value)
        client._socket.sendall(bytes(header) + b"evil")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("field", IMPOSSIBLE)
def test_an_impossible_record_ends_it(name: str, field: str) -> None:
    with connected(name) as ends:
        forge(name, ends, field)
        assert take(ends.worker) == (1, b"good")
        with pytest.raises(Corrupt, match=str(IMPOSSIBLE[field][2])):
            ends.worker.acquire(0.0)
        # And for good.
        with pytest.raises((Corrupt, RingClosed)):
            ends.worker.acquire(0.0)


def test_a_client_is_told_no_stream_but_a_stream() -> None:
    """An fd that is none is refused and closed."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    reader, writer = os.pipe()
    with left, open(writer, "wb"):
        for fd in (right.detach(), reader, os.open("/dev/null", os.O_RDONLY)):
            with pytest.raises(Corrupt, match="no UNIX stream socket"):
                StreamTransport.attach(fd, 1)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
