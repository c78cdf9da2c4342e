"""Closes its sockets one by one, or for one direction alone.

A session that is half gone must end, or go on; it must not wait for ever.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import Attacker, attacking
from tests.hostile.calls import assert_served
from tests.hostile.conftest import Victim

REFUSAL = Refusal(None, "ends once the client cannot be answered any more", "session ended after")


def _all(attacker: Attacker) -> bool:
    attacker.control.close()
    if attacker.stream is not None:
        attacker.stream.close()
    return True


def _control(how: int) -> Callable[[Attacker], bool]:
    def close(attacker: Attacker) -> bool:
        attacker.control.shutdown(how)
        # The stream, and rings, are as usual as long as the process is known to live.
        return how == socket.SHUT_RDWR and attacker.stream is None

    return close


def _stream(how: int) -> Callable[[Attacker], bool]:
    def close(attacker: Attacker) -> bool:
        if attacker.stream is None:
            return False
        attacker.stream.shutdown(how)
        return how != socket.SHUT_RD

    return close


VARIANTS = {
    "every socket, but not the memory": Variant(_all),
    "control, for sending": Variant(_control(socket.SHUT_WR)),
    "control, for receiving": Variant(_control(socket.SHUT_RD)),
    "control, both ways": Variant(_control(socket.SHUT_RDWR)),
    "stream, for sending": Variant(_stream(socket.SHUT_WR)),
    "stream, for receiving": Variant(_stream(socket.SHUT_RD)),
    "stream, both ways": Variant(_stream(socket.SHUT_RDWR)),
}


def scene(
    victim: Victim, transport: str, close: Callable[[Attacker], bool], refusal: Refusal
) -> None:
    """It ends at once, or when the attacker leaves."""
    with attacking(victim.address, transport) as attacker:
        assert_served(attacker)
        ends = close(attacker)
        if ends:
            victim.expect_log(refusal.log)
    if not ends:
        victim.expect_log(refusal.log)
