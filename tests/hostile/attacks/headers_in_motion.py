"""Changes a header to and fro all the time, so that it is right now and then when it is looked at.

What is read twice can be good when it is checked, and another thing when it is used.
"""

from __future__ import annotations

import contextlib
import select
import threading
from collections.abc import Iterator

from tests.hostile.attack import Refusal, Variant
from tests.hostile.attacker import PAGE, Attacker, attacking
from tests.hostile.calls import call
from tests.hostile.conftest import Victim

TRANSPORTS = ("shared",)
REFUSAL = Refusal(None, "read once; then answered, refused, or the session ends", "session ended")
#: In the record's header, or in the call's: where, how many bytes, and what for.
_LENGTH, _SEQUENCE = (0, 8), (24, 8)
_LAYER, _TOKENS, _HIDDEN_SIZE, _TOP_K = (68, 4), (88, 4), (92, 4), (96, 2)
VARIANTS = {
    "the record's length": Variant((*_LENGTH, 2**63)),
    "the record's sequence": Variant((*_SEQUENCE, 2**40)),
    "the layer": Variant((*_LAYER, 2**32 - 1)),
    "n_tokens": Variant((*_TOKENS, 2**32 - 1)),
    "n_tokens by a little": Variant((*_TOKENS, 8)),
    "hidden_size": Variant((*_HIDDEN_SIZE, 2**31)),
    "top_k": Variant((*_TOP_K, 2**16 - 1)),
}


def scene(victim: Victim, transport: str, what: tuple[int, int, int], refusal: Refusal) -> None:
    """Ten sessions, each until its call is answered, or it is ended."""
    for _ in range(10):
        with attacking(victim.address, transport) as attacker:
            attacker.prepare(call())
            with _flipping(attacker, *what):
                attacker.publish()
                while not _is_answered(attacker):
                    pass
        victim.expect_log(refusal.log)


@contextlib.contextmanager
def _flipping(attacker: Attacker, offset: int, size: int, other: int) -> Iterator[None]:
    at = slice(PAGE + offset, PAGE + offset + size)
    ring, good, bad = attacker.calls, attacker.calls[at], other.to_bytes(size, "little")
    is_over = threading.Event()

    def flip() -> None:
        while not is_over.is_set():
            ring[at] = bad
            ring[at] = good

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _is_answered(attacker: Attacker) -> bool:
    """A reply has come, with rows or an error, or the session was ended with a reason."""
    if attacker.bytes_of_replies():
        assert attacker.receive()[:2] == b"\1\0"
        return True
    if select.select([attacker.control], [], [], 0.001)[0]:
        assert attacker.farewell()[0] == "goodbye"
        return True
    return False
