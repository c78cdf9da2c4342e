"""Connects forty times and says nothing.

Were one connection after the other answered, nobody else would ever get his turn.
"""

from __future__ import annotations

import contextlib

import moeshm
from tests.crash.arithmetic import FREE, assert_exact, make_inputs
from tests.hostile.attack import Refusal
from tests.hostile.attacker import attacking
from tests.hostile.conftest import Victim

REFUSAL = Refusal(None, "each ends after 5 s, and others are served", "got no session")


def scene(victim: Victim, transport: str, _: None, __: Refusal) -> None:
    """Somebody who comes meanwhile is served."""
    with contextlib.ExitStack() as stack:
        for _number in range(40):
            stack.enter_context(attacking(victim.address))
        inputs = make_inputs(FREE, 77)
        with moeshm.connect(victim.address, transport=transport) as client:
            assert_exact(client.compute(*inputs), inputs)
    victim.expect_ends(41)
