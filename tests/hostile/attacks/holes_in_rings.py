"""Gives the memory of its rings back to the system while the worker reads it.

Seals do not forbid that: pages that were there are gone, and come again, empty, when touched.
"""

from __future__ import annotations

import mmap

from moeshm.errors import WorkerDied
from tests.hostile.attack import Refusal
from tests.hostile.attacker import PAGE, PRODUCER_WORD, Attacker
from tests.hostile.calls import call

TRANSPORTS = ("shared",)
REFUSAL = Refusal(WorkerDied, "the other end of the ring wrote", "the client broke the protocol")


def attack(attacker: Attacker, _: None) -> None:
    """A call is published whose record is a hole by then, and so is the rest of both rings."""
    before = attacker.end_of_calls
    attacker.prepare(call())
    for ring in (attacker.calls, attacker.replies):
        ring.madvise(mmap.MADV_REMOVE, PAGE, len(ring) - PAGE)
    attacker.poke(attacker.calls, PRODUCER_WORD, (before + 512) << 1)
