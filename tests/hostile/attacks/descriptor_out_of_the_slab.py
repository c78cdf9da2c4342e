"""Describes a call whose arrays are not in its slab, or whose slot is none.

The worker would read, and write its result, wherever the attacker says.
"""

from __future__ import annotations

from moeshm.errors import WorkerDied
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import DESCRIPTOR, Attacker
from tests.hostile.calls import assert_served, descriptor, give

SLAB, N_SERVED = "pinned", 0
REFUSAL = Refusal(WorkerDied, "broke the protocol", "the client broke the protocol")
_LIES = {
    "hidden states that are not aligned": {"x": 8},
    "hidden states before the slab": {"x": (1 << 64) - 256},
    "ids before the slab": {"ids": (1 << 64) - 256},
    "weights that wrap": {"weights": (1 << 64) - 256},
    "weights at 2^63": {"weights": 1 << 63},
    "an output far outside": {"out": 1 << 40},
    "an output across the end": {"out": (64 << 20) - 256},
    "an output that wraps": {"out": (1 << 64) - 256},
    "a slot that is none": {"slot": 32},
    "the largest slot": {"slot": (1 << 32) - 1},
    "another version": {"version": 2},
    "another length": {"length": 64},
}
#: From the second call on, the worker knows what to expect, and looks in another way.
VARIANTS = {
    f"{name}, {when}": Variant((lie, n_before))
    for name, lie in _LIES.items()
    for n_before, when in enumerate(("at first", "later"))
}


def attack(attacker: Attacker, what: tuple[dict[str, int], int]) -> None:
    """A good call, but for what is changed."""
    lie, n_before = what
    for _ in range(n_before):
        assert_served(attacker)
    sequence = give(attacker)
    attacker.send(descriptor(**{"sequence": sequence, **lie}), type=DESCRIPTOR)
