"""Orders layers and experts that are not there, or one twice, again and again.

What was begun for an order that fails must be undone each time.
"""

from __future__ import annotations

from moeshm.errors import InvalidCall
from tests.crash.arithmetic import FREE
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import ORDER, Attacker
from tests.hostile.calls import hold

REFUSAL = Refusal(InvalidCall, "", "session ended after")
VARIANTS = {
    "an unknown layer": Variant(
        hold(experts={99: [0]}), "expert 0 of layer 99 is not on this worker"
    ),
    "an unknown expert": Variant(hold(experts={FREE: [4]}), "layer 0 has no expert 4"),
    "a huge expert": Variant(
        hold(experts={FREE: [2**64 - 1]}), "has no expert 18446744073709551615"
    ),
    "a negative expert": Variant(hold(experts={FREE: [-1]}), "layer 0 has no expert -1"),
    "an expert twice": Variant(hold(experts={FREE: [1, 1]}), "asked for twice"),
    "no layer": Variant(hold(experts={}), "a view of no layer"),
    "no expert": Variant(hold(experts={FREE: []}), "no expert is asked for"),
    "the welcome's view": Variant(hold(view=0), "view 0 is in use"),
}


def attack(attacker: Attacker, data: bytes) -> None:
    """Twenty times, the last of which is left to be read."""
    for number in range(20):
        attacker.send(data, type=ORDER)
        if number < 19:
            assert attacker.receive()[:4] == b"\1\0\1\0"
