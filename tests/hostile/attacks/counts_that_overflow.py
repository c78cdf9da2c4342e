"""Sends calls whose sizes, multiplied, pass 2^31, 2^32 or 2^63 and may come out small.

A product that wraps agrees with the record's length, and what is read lies far outside.
"""

from __future__ import annotations

from moeshm.errors import InvalidCall
from tests.crash.arithmetic import HIDDEN_SIZE, WIDE
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import Attacker
from tests.hostile.calls import call

REFUSAL = Refusal(InvalidCall, "n_tokens=", "session ended after")
#: 2 and so many tokens more take the same number of bytes, counted in 32 or in 31 bits.
WRAP_32, WRAP_31 = (1 << 32) // (HIDDEN_SIZE * 4), (1 << 31) // (HIDDEN_SIZE * 4)
VARIANTS = {
    "no tokens": Variant(call(n_tokens=0), "n_tokens=0"),
    "more tokens than allowed": Variant(call(n_tokens=9), "n_tokens=9; this worker takes 1..8"),
    "countless tokens": Variant(call(n_tokens=2**32 - 1), "n_tokens=4294967295"),
    "tokens that wrap 31 bits": Variant(call(n_tokens=WRAP_31 + 2), f"n_tokens={WRAP_31 + 2}"),
    "tokens that wrap 32 bits": Variant(call(n_tokens=WRAP_32 + 2), f"n_tokens={WRAP_32 + 2}"),
    "tokens at 2^31": Variant(call(n_tokens=1 << 31), "n_tokens=2147483648"),
    "tokens below 2^31": Variant(call(n_tokens=(1 << 31) - 1), "n_tokens=2147483647"),
    "another hidden size": Variant(call(hidden_size=2**31), "hidden_size=2147483648"),
    "a hidden size that wraps 32 bits": Variant(
        call(hidden_size=(1 << 30) + HIDDEN_SIZE), f"hidden_size={(1 << 30) + HIDDEN_SIZE}"
    ),
    "the largest hidden size": Variant(call(hidden_size=2**32 - 1), "hidden_size=4294967295"),
    "no hidden size": Variant(call(hidden_size=0), "hidden_size=0"),
    "no experts": Variant(call(top_k=0), "top_k=0"),
    "too many experts": Variant(call(top_k=65535), "top_k=65535"),
    "all of them at once": Variant(
        call(n_tokens=2**32 - 1, hidden_size=2**32 - 1, top_k=65535), "hidden_size=4294967295"
    ),
    "a product that passes 2^63": Variant(
        call(n_tokens=1 << 31, hidden_size=1 << 31, top_k=1 << 15), "hidden_size=2147483648"
    ),
    "tokens of a wide layer that wrap 32 bits": Variant(
        call(layer=WIDE, n_tokens=(1 << 19) + 2, hidden_size=2048), "n_tokens=524290"
    ),
}


def attack(attacker: Attacker, data: bytes) -> None:
    """Send it."""
    attacker.send(data)
