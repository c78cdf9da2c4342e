"""Flips the bit that sends the worker back to the start of the ring, with nothing to read there.

Each flip looks like news: a worker that looked again at once would never do anything else.
"""

from __future__ import annotations

import threading

from tests.hostile.attack import Refusal
from tests.hostile.attacker import PRODUCER_WORD, attacking
from tests.hostile.calls import assert_served
from tests.hostile.conftest import Victim

TRANSPORTS = ("shared",)
REFUSAL = Refusal(None, "served on, and the end is noticed", "session ended after 1 calls")
REBASED = 2


def scene(victim: Victim, transport: str, _: None, refusal: Refusal) -> None:
    """Until the bystander's calls are through; then it leaves without a word."""
    with attacking(victim.address, transport) as attacker:
        assert_served(attacker)
        word = attacker.end_of_calls << 1
        is_over = threading.Event()

        def storm() -> None:
            flipped = word
            while not is_over.is_set():
                flipped ^= REBASED
                attacker.poke(attacker.calls, PRODUCER_WORD, flipped)

        thread = threading.Thread(target=storm)
        thread.start()
        try:
            with attacking(victim.address, transport) as other:
                for _number in range(20):
                    assert_served(other)
            victim.expect_log("session ended after 20 calls")
            # While it storms on.
            attacker.control.close()
            victim.expect_log(refusal.log)
        finally:
            is_over.set()
            thread.join()
