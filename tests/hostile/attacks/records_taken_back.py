"""Fills its ring with records that it takes back.

They are skipped without a word: a worker that skipped on and on would let nobody else run.
"""

from __future__ import annotations

from tests.hostile.attack import Refusal
from tests.hostile.attacker import Attacker

TRANSPORTS = ("shared",)
REFUSAL = Refusal(None, "skipped; calls after them are answered", "session ended after")


def attack(attacker: Attacker, _: None) -> None:
    """As many as fit, published at once."""
    attacker.take_back()
    attacker.publish()
