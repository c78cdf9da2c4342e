"""Changes some bytes of its calls and orders at random.

What nobody thought of is found this way, if by anything.
"""

from __future__ import annotations

import os
import random

from tests.hostile.attack import Refusal
from tests.hostile.attacker import ORDER, Attacker, attacking
from tests.hostile.calls import call, hold
from tests.hostile.conftest import Victim

REFUSAL = Refusal(None, "answered, refused, or the session ends", "session ended after")


def scene(victim: Victim, transport: str, _: None, refusal: Refusal) -> None:
    """Sixty sessions."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _number in range(60):
        with attacking(victim.address, transport) as attacker:
            _send_noise(attacker, rng)
        victim.expect_log(refusal.log)


def _send_noise(attacker: Attacker, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 3)):
        data = bytearray(call())
        for _ in range(rng.randint(1, 8)):
            # Mostly in the header and the ids; the backend takes the first value for a tag.
            at = rng.choice((rng.randrange(80), rng.randrange(132, len(data))))
            data[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        order = bytearray(hold())
        order[rng.randrange(len(order))] = rng.randrange(256)
        try:
            attacker.send(bytes(data))
            attacker.send(bytes(order), type=ORDER)
        except (BrokenPipeError, ConnectionResetError):
            return
