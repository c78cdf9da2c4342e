"""Orders forty views without releasing any, and never waits for an answer.

Each view takes memory, and one that is being loaded a thread.
"""

from __future__ import annotations

import msgspec

from moeshm.errors import InvalidCall
from tests.hostile.attack import Refusal
from tests.hostile.attacker import ORDER, attacking
from tests.hostile.calls import call, hold
from tests.hostile.conftest import Victim

REFUSAL = Refusal(InvalidCall, "is the most", "session ended after 0 calls")


def scene(victim: Victim, transport: str, _: None, refusal: Refusal) -> None:
    """Views are bounded, and those that are released come free; nobody waits for their answers."""
    with attacking(victim.address, transport) as attacker:
        for number in range(1, 40):
            attacker.send(hold(view=number), type=ORDER)
        says = [attacker.receive()[64:].decode(errors="replace") for _number in range(39)]
        assert sum(refusal.says in each for each in says) == 32
        for number in range(40):
            attacker.send(msgspec.msgpack.encode({"type": "release", "view": number}), type=ORDER)
        attacker.send(call())
        assert b"view 0 is not held in this session; it holds []" in attacker.receive()
    victim.expect_log(refusal.log)
