"""Overwrites the positions and states in the control pages of its rings.

They say how much may be read: believed, they lead out of the ring, or round it for ever.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import (
    CONSUMER_STATE,
    CONSUMER_WORD,
    PAGE,
    PRODUCER_STATE,
    PRODUCER_WORD,
    Attacker,
    attacking,
)
from tests.hostile.calls import assert_served, call
from tests.hostile.conftest import Victim

TRANSPORTS = ("shared",)
REFUSAL = Refusal(None, "the session ends", "session ended after 1 calls")


def _calls_word(value: int) -> Callable[[Attacker], None]:
    """Says how far the attacker has written."""
    return lambda attacker: attacker.poke(attacker.calls, PRODUCER_WORD, value)


def _everything(value: int) -> Callable[[Attacker], None]:
    """Overwrites both control pages."""

    def attack(attacker: Attacker) -> None:
        for ring in (attacker.replies, attacker.calls):
            ring[:PAGE] = bytes([value]) * PAGE

    return attack


def _is_closed(ring: str, offset: int) -> Callable[[Attacker], None]:
    """Says that an end is closed."""
    return lambda attacker: attacker.poke(getattr(attacker, ring), offset, 1)


def _closed_for_replies(attacker: Attacker) -> None:
    attacker.poke(attacker.replies, CONSUMER_STATE, 1)
    attacker.send(call())


def _read_ahead_of_replies(attacker: Attacker) -> None:
    attacker.poke(attacker.replies, CONSUMER_WORD, (1 << 40) << 1)
    attacker.poke(attacker.calls, PRODUCER_WORD, 2**64 - 1)


VARIANTS = {
    "a position beyond the ring": Variant(_calls_word((1 << 40) << 1)),
    "a position not aligned": Variant(_calls_word((64 + 8) << 1)),
    "a position that goes back": Variant(_calls_word(0)),
    "all ones": Variant(_calls_word(2**64 - 1)),
    "impossible bits": Variant(_calls_word((320 << 1) | 0x40)),
    "records that were never written": Variant(_calls_word(4096 << 1)),
    "every word zero": Variant(_everything(0)),
    "every word all ones": Variant(_everything(0xFF)),
    "both positions at once": Variant(_read_ahead_of_replies),
    "closed as it goes on": Variant(_is_closed("calls", PRODUCER_STATE)),
    "closed for replies": Variant(_closed_for_replies),
}


def scene(
    victim: Victim, transport: str, what: Callable[[Attacker], None], refusal: Refusal
) -> None:
    """The worker says why, or finds that the client closed it."""
    with attacking(victim.address, transport) as attacker:
        assert_served(attacker)
        what(attacker)
        attacker.last_word()
        line = victim.expect_log(refusal.log)
        assert "the client broke the protocol" in line or "the client closed it" in line
