"""A record that comes in slowly holds its reader no longer than it may take; one that came in time
is taken."""

from __future__ import annotations

import math
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from moeshm.transport.stream import StreamTransport

EPOCH, PAYLOAD = 7, bytes(range(100))
BYTES = struct.pack("<QIIQQ", len(PAYLOAD), 1, 0, EPOCH, 0) + PAYLOAD


@pytest.fixture
def dribble() -> Iterator[StreamTransport]:
    """An end that always has one more byte."""
    # Of packets it takes one at a time.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        for byte in BYTES:
            theirs.send(bytes([byte]))
        transport = StreamTransport(ours, EPOCH, True)
        yield transport
        transport.close()


def test_bytes_without_end_are_read_until_the_deadline(dribble: StreamTransport) -> None:
    n_reads = 1
    while not dribble._read(time.monotonic() - 1):
        n_reads += 1
    # After the last of the header, the first of the rest, and what came before is kept.
    assert n_reads == len(BYTES) - 1
    assert bytes(dribble.acquire(0.0)) == PAYLOAD


def test_without_a_deadline_all_of_it_is_read(dribble: StreamTransport) -> None:
    assert dribble._read(math.inf)
    assert bytes(dribble.acquire(0.0)) == PAYLOAD


@pytest.fixture
def ends() -> Iterator[tuple[StreamTransport, StreamTransport]]:
    ours, fds = StreamTransport.create(EPOCH)
    theirs = StreamTransport.attach(fds[0], EPOCH)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.mark.parametrize("is_seen", [True, False], ids=["seen", "after a slice"])
def test_a_record_that_came_in_time_is_taken_however_late_its_reader_is(
    ends: tuple[StreamTransport, StreamTransport], monkeypatch: pytest.MonkeyPatch, is_seen: bool
) -> None:
    """Its thread gets a CPU, or the interpreter, only after the deadline."""
    ours, theirs = ends
    poll, looks = theirs._ready, 0

    def late(events: int, timeout_ms: float) -> set[int]:
        nonlocal looks
        looks += 1
        if looks > 1:
            return poll(events, timeout_ms)
        ours.write((PAYLOAD,), 1)
        ready = poll(events, 1e3)
        while time.monotonic() < deadline:
            pass
        return ready if is_seen else set()

    monkeypatch.setattr(theirs, "_ready", late)
    deadline = time.monotonic() + 0.02
    assert bytes(theirs.acquire(0.01)) == PAYLOAD
