"""Wishes for slabs that the worker cannot give, or that are none.

It must not take memory for what it refuses, nor promise a device that it has not got.
"""

from __future__ import annotations

import os

from moeshm.errors import HandshakeRefused
from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import attacking, hello
from tests.hostile.conftest import Victim

REFUSAL = Refusal(HandshakeRefused, "slab", "process ")
VARIANTS = {
    "device": Variant("device"),
    "auto": Variant("auto"),
    "pinned": Variant("pinned"),
    "none": Variant(""),
    "huge": Variant("huge"),
    "a number": Variant(7),
}


def scene(victim: Victim, transport: str, wish: str | int, refusal: Refusal) -> None:
    """A worker without a GPU has no device memory to give, and `auto` is what there is."""
    with attacking(victim.address) as attacker:
        attacker.control.send(hello(transport=transport, slab=wish, vendor="cuda"))
        if wish in ("huge", 7):
            kind, reason = attacker.farewell()
            assert kind == "refusal"
            assert refusal.says in reason
            victim.expect_log("got no session")
            return
        answer, fds = attacker.receive_control()
        expected = {"shared": 2, "stream": 1}[transport] + (wish in ("auto", "pinned"))
        for fd in fds:
            os.close(fd)
        assert answer["type"] == "welcome"
        assert len(fds) == expected
        got = None if answer["slab"] is None else answer["slab"]["kind"]
        assert got == ("pinned" if wish in ("auto", "pinned") else None)
        assert ("no device slab" in answer["slab_refused"]) == (wish in ("device", "auto"))
    victim.expect_log("session ended after 0 calls")
