"""Describes a call, never gives its arrays, and hangs up.

The worker waits for them, in memory that nobody writes any more.
"""

from __future__ import annotations

from tests.hostile.attack import Refusal
from tests.hostile.attacker import DESCRIPTOR, attacking
from tests.hostile.calls import descriptor
from tests.hostile.conftest import Victim

REFUSAL = Refusal(None, "what was made for it is freed", "the arrays of its call will not come")


def scene(victim: Victim, transport: str, _: None, refusal: Refusal) -> None:
    """The worker waits for the arrays no longer than for the client."""
    with attacking(victim.address, transport, "pinned") as attacker:
        attacker.send(descriptor(1), type=DESCRIPTOR)
    victim.expect_log(refusal.log)
