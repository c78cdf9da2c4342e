"""Sends records of types that only a worker sends, or nobody.

What reads one kind of record must not be given another.
"""

from __future__ import annotations

from moeshm.errors import WorkerDied
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import REPLY, Attacker
from tests.hostile.calls import call

REFUSAL = Refusal(WorkerDied, "is no call", "the client broke the protocol")
VARIANTS = {
    "a reply": Variant(REPLY, "record type 2"),
    "type 0": Variant(0, "record type 0"),
    "type 5": Variant(5, "record type 5"),
    "the largest type": Variant((1 << 32) - 1, "record type 4294967295"),
}


def attack(attacker: Attacker, kind: int) -> None:
    """A good call, but for its type."""
    attacker.send(call(), type=kind)
