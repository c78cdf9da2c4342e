"""Sends file descriptors along with the parts of its hello, up to as many as a packet has room for.

Each stays open in the worker unless somebody closes it, and a process may have only so many.
"""

from __future__ import annotations

import socket

from moeshm.errors import HandshakeRefused
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import Attacker

HAS_SESSION, N_SERVED, TRANSPORTS = False, 0, ("shared",)
REFUSAL = Refusal(HandshakeRefused, "carries fds", "got no session")
VARIANTS = {
    "one": Variant([1]),
    "as many as a packet has room for": Variant([253]),
    "in a later part": Variant([0, 4]),
}


def attack(attacker: Attacker, counts: list[int]) -> None:
    """So many with each of several packets that announce more."""
    with open("/dev/null", "rb") as null:
        for count in counts:
            socket.send_fds(attacker.control, [b"\1x"], [null.fileno()] * count)
