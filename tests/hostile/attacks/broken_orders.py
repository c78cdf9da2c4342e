"""Sends orders that are none: no msgpack, numbers out of range, lists without end.

An order is parsed out of memory that the attacker writes, and says what is to be loaded.
"""

from __future__ import annotations

from moeshm.errors import WorkerDied
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import ORDER, Attacker
from tests.hostile.calls import call, hold

REFUSAL = Refusal(WorkerDied, "the client broke the protocol", "the client broke the protocol")
VARIANTS = {
    "nothing": Variant(b""),
    "a call": Variant(call()),
    "no msgpack": Variant(b"\xc1" * 64),
    "nested without end": Variant(b"\x91" * 60_000),
    "half of one": Variant(hold()[:-3]),
    "an unknown order": Variant(hold(type="drop")),
    "a view too large": Variant(hold(view=2**32)),
    "a view below 0": Variant(hold(view=-1)),
    "a layer below 0": Variant(hold(experts={-1: [0]})),
    "no list of experts": Variant(hold(experts={0: "all"})),
    "experts without end": Variant(hold(experts={0: [0] * 125_000}) + b"\0"),
    "a list of 4 G experts": Variant(hold(experts={0: []})[:-1] + b"\xdd\xff\xff\xff\xff"),
    "a call id below 0": Variant(hold(call_id=-1)),
}


def attack(attacker: Attacker, data: bytes) -> None:
    """Send it."""
    attacker.send(data, type=ORDER)
