"""Hangs up at every point of the handshake.

What was made for the session so far, its rings above all, would have no owner.
"""

from __future__ import annotations

from tests.hostile.attack import BOTH, Refusal, Variant
from tests.hostile.attacker import attacking, hello
from tests.hostile.conftest import Victim

REFUSAL = Refusal(
    None, "what was made for it is freed", "closed the connection during the handshake"
)
VARIANTS = {
    "at once": Variant([]),
    "after a mark": Variant([b"\1"]),
    "after half a hello": Variant([b"\1" + hello()[1:9]]),
}
TRANSPORTS = BOTH[:1]


def scene(victim: Victim, _: str, packets: list[bytes], refusal: Refusal) -> None:
    """Send these and leave."""
    with attacking(victim.address) as attacker:
        for each in packets:
            attacker.control.send(each)
    victim.expect_log(refusal.log)
