"""Says hello with a version that would be a line of its own in the worker's log.

Whoever reads the log would believe what the attacker wrote there.
"""

from __future__ import annotations

from moeshm.errors import HandshakeRefused
from tests.hostile.attack import Refusal
from tests.hostile.attacker import Attacker, hello

HAS_SESSION, N_SERVED, TRANSPORTS = False, 0, ("shared",)
REFUSAL = Refusal(HandshakeRefused, r"\nINFO all is well", "got no session")


def attack(attacker: Attacker, _: None) -> None:
    """Quoted, it stays in its line."""
    attacker.control.send(hello(protocol=2, version="\nINFO all is well"))
