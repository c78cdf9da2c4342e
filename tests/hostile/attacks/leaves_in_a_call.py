"""Hangs up while its call is computed.

The worker is about to write an answer into memory that is nobody's any more.
"""

from __future__ import annotations

from tests.hostile.attack import Refusal
from tests.hostile.attacker import attacking
from tests.hostile.calls import call
from tests.hostile.conftest import Victim

REFUSAL = Refusal(None, "what was made for it is freed", "session ended after")


def scene(victim: Victim, transport: str, _: None, refusal: Refusal) -> None:
    """Five times."""
    for _number in range(5):
        with attacking(victim.address, transport) as attacker:
            attacker.send(call())
    for _number in range(5):
        victim.expect_log(refusal.log)
