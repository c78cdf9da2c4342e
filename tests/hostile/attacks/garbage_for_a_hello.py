"""Says something else than a handshake message to the worker's socket.

Whatever reads it must neither crash, nor recurse, nor take memory for lengths that are only said.
"""

from __future__ import annotations

import os

import msgspec

from moeshm.errors import HandshakeRefused
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import Attacker

HAS_SESSION, N_SERVED, TRANSPORTS = False, 0, ("shared",)
REFUSAL = Refusal(HandshakeRefused, "no handshake message", "got no session")
_encode = msgspec.msgpack.encode


def _map_of(*pairs: bytes) -> bytes:
    """msgpack of keys and values that are msgpack already."""
    return b"\0" + bytes([0x80 + len(pairs) // 2]) + b"".join(pairs)


VARIANTS = {
    "another protocol": Variant([b"GET / HTTP/1.1\r\n\r\n"], "handshake packet"),
    "no msgpack": Variant([b"\0\xc1\xc1\xc1"]),
    "nothing": Variant([b"\0"]),
    "random bytes": Variant([b"\0\xc1" + os.urandom(1000)]),
    "nested without end": Variant(
        [_map_of(_encode("type"), _encode("hello"), _encode("x"), b"\x91" * 3000)]
    ),
    "text that is none": Variant(
        [_map_of(_encode("type"), _encode("refusal"), _encode("reason"), b"\xa2\xff\xfe")]
    ),
    "a length of which nothing follows": Variant(
        [_map_of(_encode("type"), _encode("welcome"), _encode("layers"), b"\xdf" + b"\xff" * 4)]
    ),
    "text of 4 GiB": Variant(
        [_map_of(_encode("type"), _encode("hello"), _encode("version"), b"\xdb" + b"\xff" * 4)]
    ),
    "a packet too long": Variant([b"\0" + b"x" * 60_000], "too long"),
    "a message too long": Variant([b"\1" + b"x" * 3000, b"\1" + b"x" * 3000], "at most 4096"),
}


def attack(attacker: Attacker, packets: list[bytes]) -> None:
    """Send them."""
    for each in packets:
        attacker.control.send(each)
