"""Cuts the memory of its rings, or of its slab, while the worker uses it.

The worker's next touch of what is gone would end it by SIGBUS.
"""

from __future__ import annotations

import os

import pytest

from tests.hostile.attack import BOTH, Refusal, Variant
from tests.hostile.attacker import PAGE, attacking, hello
from tests.hostile.conftest import Victim

TRANSPORTS = BOTH[:1]
REFUSAL = Refusal(
    None, "the kernel refuses: EPERM, the segments are sealed", "session ended after 0 calls"
)
VARIANTS = {"rings": Variant(("", 2)), "rings and a slab": Variant(("pinned", 3))}


def scene(victim: Victim, transport: str, what: tuple[str, int], refusal: Refusal) -> None:
    """Neither shrunk nor grown."""
    slab, n_fds = what
    with attacking(victim.address) as attacker:
        attacker.control.send(hello(transport=transport, slab=slab))
        _, fds = attacker.receive_control()
        assert len(fds) == n_fds
        for fd in fds:
            for size in (0, PAGE, 1 << 30):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, size)
            os.close(fd)
    victim.expect_log(refusal.log)
