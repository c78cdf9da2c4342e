"""Says hello and hangs up, again and again; before or after the welcome comes, nobody knows.

Rings are made, and a thread runs, for a client that is gone already.
"""

from __future__ import annotations

from tests.hostile.attack import Refusal
from tests.hostile.attacker import attacking, hello
from tests.hostile.conftest import Victim

REFUSAL = Refusal(None, "what was made for it is freed", "process ")


def scene(victim: Victim, transport: str, _: None, __: Refusal) -> None:
    """Ten times."""
    for _number in range(10):
        with attacking(victim.address) as attacker:
            attacker.control.send(hello(transport=transport))
    victim.expect_ends(10)
