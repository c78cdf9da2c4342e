"""Sends a call whose length is not what its header says.

Read by the header, it would reach beyond the record, into another's or out of the ring.
"""

from __future__ import annotations

from moeshm.dtypes import DType
from moeshm.errors import WorkerDied
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import Attacker
from tests.hostile.calls import call

REFUSAL = Refusal(WorkerDied, "the client broke the protocol", "the client broke the protocol")
VARIANTS = {
    "no header": Variant(call(size=63)),
    "nothing": Variant(b""),
    "an unknown version": Variant(call(version=2)),
    "an impossible version": Variant(call(version=0)),
    "another header length": Variant(call(header_bytes=65)),
    "more tokens than came": Variant(call(n_tokens=8)),
    "fewer tokens than came": Variant(call(n_tokens=1)),
    "a narrower dtype": Variant(call(dtype=int(DType.BF16))),
    "a byte too few": Variant(call(size=len(call()) - 1)),
    "a byte too many": Variant(call(size=len(call()) + 1)),
    "only a header": Variant(call(size=64)),
    "ids and weights alone": Variant(call(size=128)),
}


def attack(attacker: Attacker, data: bytes) -> None:
    """Send it."""
    attacker.send(data)
