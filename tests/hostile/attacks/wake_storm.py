"""Sets and clears the bits by which the two ends of a ring wake each other, all the time.

The worker could sleep through a call, spin for ever, or be woken without end.
"""

from __future__ import annotations

import threading

from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import CONSUMER_WORD, PRODUCER_WORD, attacking
from tests.hostile.calls import assert_served
from tests.hostile.conftest import Victim

TRANSPORTS = ("shared",)
REFUSAL = Refusal(
    None, "served on; the attacker's own calls may come late", "session ended after 20 calls"
)
ARMED = 1
VARIANTS = {
    "of the worker's own words": Variant(("replies", PRODUCER_WORD)),
    "of the words it waits for": Variant(("calls", CONSUMER_WORD)),
}


def scene(victim: Victim, transport: str, what: tuple[str, int], refusal: Refusal) -> None:
    """Twenty calls meanwhile; without an end of their own nobody would notice the storm."""
    name, offset = what
    is_over = threading.Event()
    with attacking(victim.address, transport) as attacker:
        ring = getattr(attacker, name)

        def storm() -> None:
            # The low byte alone: the position stays the worker's.
            while not is_over.is_set():
                ring[offset] |= ARMED
                ring[offset] &= ~ARMED & 0xFF

        thread = threading.Thread(target=storm)
        thread.start()
        try:
            for _ in range(20):
                assert_served(attacker)
        finally:
            is_over.set()
            thread.join()
    victim.expect_log(refusal.log)
