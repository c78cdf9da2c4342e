"""Describes a call that its layer cannot have, with sizes that overflow among them.

Sizes are multiplied to say how far the arrays go; one that wraps fits anywhere.
"""

from __future__ import annotations

from moeshm.errors import DeadlineExceeded, InvalidCall
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import DESCRIPTOR, Attacker
from tests.hostile.calls import assert_served, descriptor, give

SLAB, N_SERVED = "pinned", 0
REFUSAL = Refusal(InvalidCall, "", "session ended after")
_LIES: dict[str, tuple[dict[str, int], str]] = {
    "an unknown layer": ({"layer": 77}, "layer 77 is not on this worker"),
    "another hidden size": ({"hidden_size": 17}, "hidden_size=17"),
    "the largest hidden size": ({"hidden_size": (1 << 32) - 1}, "hidden_size=4294967295"),
    "no tokens": ({"n_tokens": 0}, "n_tokens=0"),
    "tokens at 2^31": ({"n_tokens": 1 << 31}, "n_tokens="),
    "tokens that wrap 32 bits": ({"n_tokens": (1 << 26) + 2}, "n_tokens=67108866"),
    "too many experts": ({"top_k": 3}, "top_k=3"),
    "no experts": ({"top_k": 0}, "top_k=0"),
    "the most experts": ({"top_k": 65535}, "top_k=65535"),
    "an unknown dtype": ({"dtype": 9}, "dtype 9"),
    "an unknown id space": ({"are_global": 2}, "id space 2"),
    "an unknown view": ({"view": 5}, "view 5 is not held"),
    "a deadline long past": ({"deadline_ns": 1}, "deadline passed"),
}
VARIANTS = {
    f"{name}, {when}": Variant(
        (lie, n_before), says, DeadlineExceeded if "deadline_ns" in lie else None
    )
    for name, (lie, says) in _LIES.items()
    for n_before, when in enumerate(("at first", "later"))
}


def attack(attacker: Attacker, what: tuple[dict[str, int], int]) -> None:
    """A good call, but for what is changed."""
    lie, n_before = what
    for _ in range(n_before):
        assert_served(attacker)
    sequence = give(attacker)
    attacker.send(descriptor(sequence, **lie), type=DESCRIPTOR)
