"""Says hello with values that no client has, or speaks the worker's part.

A worker that took them would size rings by them, or answer in a way that it does not know.
"""

from __future__ import annotations

import msgspec

from moeshm.errors import HandshakeRefused
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import Attacker, hello

HAS_SESSION, N_SERVED, TRANSPORTS = False, 0, ("shared",)
REFUSAL = Refusal(HandshakeRefused, "batch_capacity=", "got no session")
VARIANTS = {
    "the worker's part": Variant(
        b"\0" + msgspec.msgpack.encode({"type": "goodbye", "reason": "x"}),
        "expected hello, got goodbye",
    ),
    "another version": Variant(hello(protocol=2), "speaks protocol 2"),
    "an unknown transport": Variant(hello(transport="carrier pigeon"), "carrier pigeon"),
    "no room": Variant(hello(batch_capacity=0), "batch_capacity=0"),
    "less than none": Variant(
        hello(batch_capacity=-(1 << 63)), "batch_capacity=-9223372036854775808"
    ),
    "a token too many": Variant(hello(batch_capacity=4097), "batch_capacity=4097"),
    "tokens that overflow 31 bits": Variant(hello(batch_capacity=1 << 31), "=2147483648"),
    "too much room": Variant(hello(batch_capacity=1 << 40), "batch_capacity=109951"),
    "tokens that overflow 63 bits": Variant(
        hello(batch_capacity=(1 << 64) - 1), "batch_capacity=18446744073709551615"
    ),
    "numbers that are text": Variant(hello(batch_capacity="8"), "Expected `int`"),
    "numbers that are fractions": Variant(hello(batch_capacity=8.5), "Expected `int`"),
    "another placement": Variant(hello(placement="0" * 16), "the client's placement"),
}


def attack(attacker: Attacker, packet: bytes) -> None:
    """Send it."""
    attacker.control.send(packet)
