"""Writes bytes that are no record into the stream of a session.

Where records have no marks between them, whatever follows is taken for the rest of one.
"""

from __future__ import annotations

import random

from moeshm.errors import WorkerDied
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import Attacker

TRANSPORTS = ("stream",)
REFUSAL = Refusal(WorkerDied, "the other end of the stream sent record", "broke the protocol")
VARIANTS = {
    "text": Variant(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "noise": Variant(random.Random(6).randbytes(1 << 16)),
    "zeros": Variant(bytes(1 << 16)),
    "ones": Variant(b"\xff" * (1 << 16)),
}


def attack(attacker: Attacker, data: bytes) -> None:
    """Whether all of it is taken, nobody knows."""
    assert attacker.stream is not None
    attacker.stream.send(data)
