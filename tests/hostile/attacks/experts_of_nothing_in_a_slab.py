"""Puts ids of experts that are not there into its slab.

They are in memory that it goes on writing, and pick the weights that are read.
"""

from __future__ import annotations

from moeshm.errors import InvalidCall
from tests.crash.arithmetic import NUM_EXPERTS
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import DESCRIPTOR, Attacker
from tests.hostile.calls import GOOD, descriptor, give

SLAB, N_SERVED = "pinned", 0
REFUSAL = Refusal(InvalidCall, "expert id", "session ended after")
VARIANTS = {
    f"{wrong}": Variant(wrong, f"expert id {wrong}")
    for wrong in (-2, NUM_EXPERTS, 1 << 30, -(1 << 31))
}


def attack(attacker: Attacker, wrong: int) -> None:
    """The last of them."""
    ids = GOOD.topk_ids.copy()
    ids[1, 1] = wrong
    attacker.send(descriptor(give(attacker, ids)), type=DESCRIPTOR)
