"""Sends file descriptors along with the bytes of its calls (SCM_RIGHTS bombs).

A process that receives bytes may receive fds with them unasked, and would run out of its own.
"""

from __future__ import annotations

import os
import select

from tests.hostile.attack import TAKING_AND_REFUSING, Refusal, Variant
from tests.hostile.attacker import PATIENCE_S, Attacker
from tests.hostile.calls import call

TRANSPORTS, VICTIMS = ("stream",), TAKING_AND_REFUSING
REFUSAL = Refusal(
    None, "dropped or refused by the kernel; the calls are answered", "session ended after"
)
VARIANTS = {"with a call": Variant((1, 1 << 16)), "with every few bytes": Variant((253, 20))}


def attack(attacker: Attacker, what: tuple[int, int]) -> None:
    """So many with each part of so many bytes. A pipe's end tells that none of them is kept."""
    n_fds, n_bytes = what
    assert attacker.stream is not None
    told, held = os.pipe()
    for _ in range(10):
        data = attacker.record(call())
        for at in range(0, len(data), n_bytes):
            part = data[at : at + n_bytes]
            attacker.send_fds(attacker.stream, part, [held] * n_fds)
        assert attacker.receive()[:4] == b"\1\0\0\0"
        attacker.n_served += 1
    os.close(held)
    assert select.select([told], [], [], PATIENCE_S)[0], "the worker keeps an fd"
    assert os.read(told, 1) == b""
    os.close(told)
