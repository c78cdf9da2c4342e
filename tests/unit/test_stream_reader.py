"""A record that comes in slowly holds its reader no longer than it may take; one that came in time
is taken, and none is lost unseen."""

from __future__ import annotations

import contextlib
import math
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest

from moeshm.errors import RingClosed
from moeshm.transport.stream import StreamTransport, _Reader

EPOCH, PAYLOAD = 7, bytes(range(100))
BYTES = struct.pack("<QIIQQ", len(PAYLOAD), 1, 0, EPOCH, 0) + PAYLOAD


class Dribble:
    """A socket that always has one more byte."""

    def __init__(self) -> None:
        self.n_taken = 0

    def recv_into(self, view: memoryview, _n_bytes: int, _flags: int) -> int:
        view[:1] = BYTES[self.n_taken : self.n_taken + 1]
        self.n_taken += 1
        return 1


def test_bytes_without_end_are_read_until_the_deadline() -> None:
    sock: Any = Dribble()
    reader = _Reader(sock, EPOCH, 1000)
    message = None
    while message is None:
        before = sock.n_taken
        with contextlib.suppress(BlockingIOError):
            message = reader.read(time.monotonic() - 1)
        # After the last of the header, the first of the rest.
        assert sock.n_taken - before <= 2
    # What came before is kept.
    assert bytes(message) == PAYLOAD


def test_without_a_deadline_all_of_it_is_read() -> None:
    sock: Any = Dribble()
    assert bytes(_Reader(sock, EPOCH, 1000).read(math.inf)) == PAYLOAD


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


def test_a_record_that_an_interrupt_loses_takes_the_stream_with_it(
    ends: tuple[StreamTransport, StreamTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signals are looked for once more when the role was given back: the record is in hand then."""
    ours, theirs = ends

    class Interrupted:
        def tried(self, _deadline: float) -> Interrupted:
            return self

        def __enter__(self) -> bool:
            return True

        def __exit__(self, *_error: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(theirs, "_reading", Interrupted())
    ours.write((PAYLOAD,), 1)
    with pytest.raises(KeyboardInterrupt):
        theirs.acquire(10)
    with pytest.raises(RingClosed):
        theirs.write((PAYLOAD,), 1)
