"""Sends calls whose deadline is long past, or lies beyond all time.

Left to itself, arithmetic with it overflows; and work that nobody waits for is done.
"""

from __future__ import annotations

from moeshm.errors import DeadlineExceeded
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import Attacker
from tests.hostile.calls import call

REFUSAL = Refusal(DeadlineExceeded, "the deadline passed", "session ended after")
VARIANTS = {"a deadline long past": Variant(call(deadline_ns=1))}


def attack(attacker: Attacker, data: bytes) -> None:
    """Deadlines without end are calls like others."""
    for deadline_ns in (2**63 - 1, -(2**63), -1):
        attacker.send(call(deadline_ns=deadline_ns))
        assert attacker.receive()[:4] == b"\1\0\0\0"
        attacker.n_served += 1
    attacker.send(data)
