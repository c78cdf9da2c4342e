"""Floods the control socket of its session, with bytes or with file descriptors.

Nothing reads it while the session lasts: what lies there must be the sender's own burden.
"""

from __future__ import annotations

import os
import select

from tests.hostile.attack import TAKING_AND_REFUSING, Refusal, Variant
from tests.hostile.attacker import PATIENCE_S, attacking
from tests.hostile.calls import assert_served
from tests.hostile.conftest import Victim

VICTIMS = TAKING_AND_REFUSING
REFUSAL = Refusal(None, "not read; gone with the session", "session ended after 1 calls")
VARIANTS = {"bytes": Variant(0), "a pipe in each packet": Variant(1), "200 of them": Variant(200)}


def scene(victim: Victim, transport: str, n_fds: int, refusal: Refusal) -> None:
    """Until no more goes in. The other end of the pipe tells when the last copy is closed."""
    told, held = os.pipe()
    try:
        with attacking(victim.address, transport) as attacker:
            attacker.fds_are_refused = victim.refuses_fds
            attacker.control.setblocking(False)
            try:
                for _ in range(100_000):
                    attacker.send_fds(attacker.control, b"\1 noise", [held] * n_fds)
            except (BlockingIOError, OSError):
                pass
            os.close(held)
            assert_served(attacker)
        victim.expect_log(refusal.log)
        assert select.select([told], [], [], PATIENCE_S)[0], "something keeps an fd"
        assert os.read(told, 1) == b""
    finally:
        os.close(told)
