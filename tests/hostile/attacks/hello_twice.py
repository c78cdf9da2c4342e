"""Says hello again when it has a session already, or twice at once.

A worker that listened would make another set of rings, or mix up two sessions.
"""

from __future__ import annotations

from tests.hostile.attack import BOTH, Refusal, Variant
from tests.hostile.attacker import Attacker, hello

HAS_SESSION, N_SERVED, TRANSPORTS = False, 0, BOTH
REFUSAL = Refusal(None, "not read; the session is as usual", "session ended after")
VARIANTS = {"at once": Variant(True), "later": Variant(False)}


def attack(attacker: Attacker, is_at_once: bool) -> None:
    """The second is never read."""
    packet = hello(transport=attacker.transport_wish)
    attacker.control.send(packet)
    if is_at_once:
        attacker.control.send(packet)
    attacker.take_welcome()
    attacker.control.send(packet)
