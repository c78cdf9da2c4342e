"""Overwrites the header of a record: its length, epoch or sequence.

The length says where the next record is; epoch and sequence, that it is this session's next.
"""

from __future__ import annotations

from moeshm.errors import WorkerDied
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import Attacker
from tests.hostile.calls import call

REFUSAL = Refusal(WorkerDied, "", "the client broke the protocol")
_LIES = [
    {"length": 2**64 - 1},
    {"length": 2**64 - 64},
    {"length": 2**63},
    {"length": 2**63 - 1},
    {"length": 2**40},
    {"length": 2**32},
    {"length": 2**31},
    {"epoch": 0},
    {"sequence": 0},
    {"sequence": 2},
    {"sequence": 2**64 - 1},
]
VARIANTS = {
    f"{name} {value}": Variant(lie, str(value)) for lie in _LIES for name, value in lie.items()
}


def attack(attacker: Attacker, lie: dict[str, int]) -> None:
    """A good call, but for its record's header."""
    attacker.send(call(), **lie)
