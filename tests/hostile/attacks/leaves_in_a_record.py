"""Hangs up in the middle of a record.

The rest of it will never come.
"""

from __future__ import annotations

from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import attacking
from tests.hostile.calls import call
from tests.hostile.conftest import Victim

TRANSPORTS = ("stream",)
REFUSAL = Refusal(None, "what was made for it is freed", "session ended after 0 calls")
VARIANTS = {f"after {size} bytes": Variant(size) for size in (1, 31, 32, 33, 200)}


def scene(victim: Victim, transport: str, size: int, refusal: Refusal) -> None:
    """After so many bytes."""
    with attacking(victim.address, transport) as attacker:
        assert attacker.stream is not None
        attacker.stream.sendall(attacker.record(call())[:size])
    victim.expect_log(refusal.log)
