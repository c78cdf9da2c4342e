"""Describes a call in the slab of a session that has none.

The worker would look for the flags where no memory is.
"""

from __future__ import annotations

from moeshm.errors import WorkerDied
from tests.hostile.attack import Refusal
from tests.hostile.attacker import DESCRIPTOR, Attacker
from tests.hostile.calls import descriptor

N_SERVED = 0
REFUSAL = Refusal(WorkerDied, "without a slab", "the client broke the protocol")


def attack(attacker: Attacker, _: None) -> None:
    """A good one."""
    attacker.send(descriptor(1), type=DESCRIPTOR)
