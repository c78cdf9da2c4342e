"""Calls on and on, and never reads a reply.

Replies take memory until they are read, and whoever writes them waits for room.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import PAGE, Attacker, attacking
from tests.hostile.calls import assert_served, call, wide_call
from tests.hostile.conftest import Victim

VICTIM = "hasty_victim"
REFUSAL = Refusal(None, "the session ends after 10 s, or at the deadline", "session ended after")
ENDLESS = 2**63 - 1
#: What makes the deadline of its calls, and the calls.
VARIANTS = {
    "without a deadline": Variant((lambda: 0, wide_call)),
    "with a deadline soon": Variant((lambda: time.monotonic_ns() + 600_000_000, wide_call)),
    "with a deadline without end": Variant((lambda: ENDLESS, wide_call)),
    "small calls without end": Variant((lambda: ENDLESS, call)),
}
_WHY = ("its replies lay unread for too long", "took nothing for")


def scene(
    victim: Victim,
    transport: str,
    what: tuple[Callable[[], int], Callable[..., bytes]],
    refusal: Refusal,
) -> None:
    """The session ends once the worker's patience and the call's deadline are over; before, others
    are served. Whose deadline never comes keeps waiting, in his own session, until he leaves."""
    deadline, make = what
    deadline_ns = deadline()
    with attacking(victim.address, transport) as attacker:
        _send_until_full(attacker, make(deadline_ns=deadline_ns))
        with attacking(victim.address, transport) as other:
            for _ in range(10):
                assert_served(other)
        victim.expect_log("session ended after 10 calls")
        if deadline_ns != ENDLESS:
            line = victim.expect_log(refusal.log)
            assert any(why in line for why in _WHY)
    if deadline_ns == ENDLESS:
        victim.expect_log(refusal.log)


def _send_until_full(attacker: Attacker, data: bytes) -> None:
    """Until nothing more goes in: a ring's worth, or until the stream takes no more."""
    if attacker.stream is None:
        while attacker.end_of_calls + len(data) + 128 <= len(attacker.calls) - PAGE:
            attacker.send(data)
        return
    attacker.stream.settimeout(0.2)
    with contextlib.suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
        for _ in range(100_000):
            attacker.send(data)
