"""Sends more file descriptors along with its hello than a message may have.

Each stays open in the worker unless somebody closes it, and a process may have only so many.
"""

from __future__ import annotations

import socket

from moeshm.errors import HandshakeRefused
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import Attacker

HAS_SESSION, N_SERVED, TRANSPORTS = False, 0, ("shared",)
REFUSAL = Refusal(HandshakeRefused, "too many fds", "got no session")
VARIANTS = {
    "one too many": Variant([5]),
    "as many as a packet has room for": Variant([253]),
    "too many in parts": Variant([4, 4], "8 fds"),
}


def attack(attacker: Attacker, counts: list[int]) -> None:
    """So many with each of several packets that announce more."""
    with open("/dev/null", "rb") as null:
        for count in counts:
            socket.send_fds(attacker.control, [b"\1x"], [null.fileno()] * count)
