"""Says that it has read more replies than were written.

The worker would take memory for free that it never filled, and write ahead of its own position.
"""

from __future__ import annotations

from moeshm.errors import WorkerDied
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import CONSUMER_WORD, attacking
from tests.hostile.calls import wide_call
from tests.hostile.conftest import Victim

TRANSPORTS = ("shared",)
REFUSAL = Refusal(WorkerDied, "the client broke the protocol", "session ended after")
VARIANTS = {f"position {position}": Variant(position) for position in (1 << 40, 64 + 8, 1 << 62)}


def scene(victim: Victim, transport: str, position: int, refusal: Refusal) -> None:
    """The worker looks once it may have no room by what it knew; three replies are too many."""
    with attacking(victim.address, transport) as attacker:
        attacker.poke(attacker.replies, CONSUMER_WORD, position << 1)
        for _ in range(3):
            attacker.send(wide_call())
        assert refusal.says in attacker.last_word()
        victim.expect_log(refusal.log)
