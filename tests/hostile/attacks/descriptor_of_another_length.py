"""Sends a descriptor that is cut short, or longer than one is.

What is read behind it belongs to another record.
"""

from __future__ import annotations

from moeshm.errors import WorkerDied
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import DESCRIPTOR, Attacker
from tests.hostile.calls import descriptor

SLAB, N_SERVED = "pinned", 0
REFUSAL = Refusal(WorkerDied, "is no descriptor", "the client broke the protocol")
VARIANTS = {f"{size} bytes": Variant(size) for size in (0, 64, 127, 129, 192)}


def attack(attacker: Attacker, size: int) -> None:
    """Cut or filled up."""
    attacker.send(descriptor(1).ljust(192, b"\0")[:size], type=DESCRIPTOR)
