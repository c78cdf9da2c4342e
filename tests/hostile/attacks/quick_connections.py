"""Connects a hundred times, some with a session, and hangs up each time at once.

Each time something may remain: an fd, a thread, a ring.
"""

from __future__ import annotations

import moeshm
from tests.crash.arithmetic import FREE, assert_exact, make_inputs
from tests.hostile.attack import Refusal
from tests.hostile.attacker import attacking
from tests.hostile.conftest import Victim

REFUSAL = Refusal(None, "what was made for it is freed", "process ")


def scene(victim: Victim, transport: str, _: None, __: Refusal) -> None:
    """Somebody who comes after them is served."""
    for number in range(100):
        with attacking(victim.address, transport if number % 10 == 0 else None):
            pass
    inputs = make_inputs(FREE, 78)
    with moeshm.connect(victim.address, transport=transport) as client:
        assert_exact(client.compute(*inputs), inputs)
    victim.expect_ends(101)
