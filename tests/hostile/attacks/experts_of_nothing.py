"""Sends ids of experts that are not there, as local or as the model's.

An id picks the weights that are read: one out of range reads outside of them.
"""

from __future__ import annotations

from moeshm.errors import InvalidCall
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import Attacker
from tests.hostile.calls import call

REFUSAL = Refusal(InvalidCall, "expert id", "session ended after")
VARIANTS = {
    "an id too large": Variant(call([[0, 1], [2, 4]]), "expert id 4"),
    "the first id too large": Variant(call([[4, 1], [2, 3]]), "expert id 4"),
    "an id too small": Variant(call([[0, 1], [2, -2]]), "expert id -2"),
    "the largest id": Variant(call([[2**31 - 1, 1], [2, 3]]), "expert id 2147483647"),
    "the smallest local id": Variant(call([[-(2**31), 1], [2, 3]]), "expert id -2147483648"),
    "the smallest id": Variant(call([[-(2**31), 1], [2, 3]], id_space=1), "expert id -2147483648"),
    "the model's id too large": Variant(call([[0, 1], [2, 4]], id_space=1), "expert id 4"),
    "a float's bits": Variant(call([[0x3F800000, 1], [2, 3]]), "expert id 1065353216"),
}


def attack(attacker: Attacker, data: bytes) -> None:
    """Send it."""
    attacker.send(data)
