"""Gives the memory of its slab back to the system while the worker computes in it.

Seals do not forbid that: pages that were there are gone, and come again, empty, when touched.
"""

from __future__ import annotations

import mmap

from tests.hostile.attack import Refusal
from tests.hostile.attacker import DESCRIPTOR, Attacker
from tests.hostile.calls import FLAGS_BYTES, descriptor, give, wait_until_done

SLAB, N_SERVED = "pinned", 0
REFUSAL = Refusal(None, "spoils its own calls; later ones are as usual", "session ended after")


def attack(attacker: Attacker, _: None) -> None:
    """While calls are described, and computed."""
    for _number in range(50):
        attacker.send(descriptor(give(attacker)), type=DESCRIPTOR)
        attacker.slab.madvise(mmap.MADV_REMOVE, FLAGS_BYTES, len(attacker.slab) - FLAGS_BYTES)
        wait_until_done(attacker)
        attacker.n_served += 1
