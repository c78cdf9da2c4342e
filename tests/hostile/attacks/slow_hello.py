"""Takes its time over the handshake, and seems to be at it all the while (slow loris).

A time limit for each packet would start anew with each, and the worker's thread would never end.
"""

from __future__ import annotations

import select
import time

from moeshm.errors import HandshakeRefused
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import PATIENCE_S, attacking, hello
from tests.hostile.conftest import Victim

VICTIM, TRANSPORTS = "hasty_victim", ("shared",)
REFUSAL = Refusal(HandshakeRefused, "", "did not come in time")
WHOLE = hello()
VARIANTS = {
    "a byte at a time": Variant(([WHOLE[at : at + 1] for at in range(1, len(WHOLE))], 0.05)),
    "a first packet and then silence": Variant(([WHOLE[1:9]], PATIENCE_S)),
    "more for ever": Variant(([b""] * 1000, 0.02)),
    "more without a pause": Variant(([b""] * 10_000_000, 0.0)),
}


def scene(victim: Victim, _: str, what: tuple[list[bytes], float], refusal: Refusal) -> None:
    """Parts of a hello, each announcing more, until the worker hangs up."""
    parts, pause_s = what
    limit = time.monotonic() + PATIENCE_S
    with attacking(victim.address) as attacker:
        for part in parts:
            try:
                attacker.control.send(b"\1" + part)
            except (BrokenPipeError, ConnectionResetError):
                break
            # The pace is the attack; it ends as soon as the worker has had enough.
            if pause_s and select.select([attacker.control], [], [], pause_s)[0]:
                break
            assert time.monotonic() < limit, "the worker waits for ever"
        victim.expect_log(refusal.log)
