"""Announces a record of 200 MiB over a stream, and sends none of it.

A stream could make the worker hold what a header only announces.
"""

from __future__ import annotations

from moeshm.errors import WorkerDied
from tests.hostile.attack import Refusal
from tests.hostile.attacker import Attacker

TRANSPORTS, N_SERVED = ("stream",), 0
REFUSAL = Refusal(WorkerDied, f"{200 << 20} bytes", "the client broke the protocol")


def attack(attacker: Attacker, _: None) -> None:
    """Only a header."""
    attacker.send(b"", length=200 << 20)
