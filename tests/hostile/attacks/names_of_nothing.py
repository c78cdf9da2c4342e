"""Sends calls of layers, formats, id spaces and views that are not there.

Each is an index into a table of the worker's.
"""

from __future__ import annotations

from moeshm.errors import InvalidCall
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import Attacker
from tests.hostile.calls import call

REFUSAL = Refusal(InvalidCall, "unknown", "session ended after")
VARIANTS = {
    "an unknown layer": Variant(call(layer=99), "layer 99"),
    "the largest layer": Variant(call(layer=2**32 - 1), "layer 4294967295"),
    "an unknown dtype": Variant(call(dtype=200), "dtype 200"),
    "an unknown reply dtype": Variant(call(reply_dtype=3), "reply dtype 3"),
    "an unknown id space": Variant(call(id_space=2), "id space 2"),
    "an unknown view": Variant(call(view=1), "view 1 is not held"),
    "the largest view": Variant(call(view=2**32 - 1), "view 4294967295 is not held"),
}


def attack(attacker: Attacker, data: bytes) -> None:
    """Send it."""
    attacker.send(data)
