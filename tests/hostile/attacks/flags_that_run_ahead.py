"""Sets every flag of its slab at once, to far in the future.

They tell the worker that arrays are there, and others that results are.
"""

from __future__ import annotations

from tests.hostile.attack import Refusal
from tests.hostile.attacker import DESCRIPTOR, Attacker
from tests.hostile.calls import (
    DONE,
    GIVEN,
    REFUSED,
    SLOTS,
    TOLD,
    descriptor,
    give,
    set_flag,
)

SLAB, N_SERVED = "pinned", 0
REFUSAL = Refusal(None, "spoils its own calls; later ones are as usual", "session ended after")


def attack(attacker: Attacker, _: None) -> None:
    """They are the client's own calls that it spoils."""
    sequence = give(attacker)
    for slot in range(SLOTS):
        for flag in (GIVEN, DONE, REFUSED):
            set_flag(attacker, flag, TOLD >> 1, slot)
    attacker.send(descriptor(sequence), type=DESCRIPTOR)
    attacker.n_served += 1
    # The last that were not reached yet.
    attacker.slab_sequence = TOLD >> 1
