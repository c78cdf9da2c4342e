"""Moves its position back, by as little as a cache line at a time.

A worker that followed would read again what it has read, in an order of the attacker's.
"""

from __future__ import annotations

from moeshm.errors import WorkerDied
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import PRODUCER_WORD, Attacker

TRANSPORTS = ("shared",)
REFUSAL = Refusal(WorkerDied, "the position word", "the client broke the protocol")
VARIANTS = {f"by {step}": Variant(step) for step in (64, 128, 256)}


def attack(attacker: Attacker, step: int) -> None:
    """Below where the worker has read to."""
    for position in range(attacker.end_of_calls - step, -1, -step):
        attacker.poke(attacker.calls, PRODUCER_WORD, position << 1)
