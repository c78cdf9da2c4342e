"""A record that comes in slowly holds its reader no longer than it may take."""

from __future__ import annotations

import contextlib
import math
import struct
import time
from typing import Any

from moeshm.transport.stream import _Reader

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
