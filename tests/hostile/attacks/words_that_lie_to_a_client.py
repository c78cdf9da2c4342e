"""Overwrites the positions in the control pages of a client's rings, after a good handshake.

Believed, they would lead the client out of its memory, or round the ring for ever.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
from pathlib import Path

import pytest

import moeshm
from moeshm._ring import RingConsumer, RingProducer
from moeshm.errors import WorkerDied
from tests.hostile.attack import BOTH, Refusal, Variant
from tests.hostile.attacker import PAGE, PRODUCER_WORD
from tests.hostile.lying import EPOCH, INPUTS, listening, wait_until_gone, welcome

SIDE, TRANSPORTS = "worker", BOTH[:1]
REFUSAL = Refusal(WorkerDied, "the other end of the ring wrote")
#: Which ring, which word, and what is written there.
VARIANTS = {
    "replies beyond the ring": Variant((1, PRODUCER_WORD, (1 << 40) << 1)),
    "replies that go back": Variant((1, PRODUCER_WORD, (2**63 - 64) << 1)),
    "replies that are not aligned": Variant((1, PRODUCER_WORD, 72 << 1)),
    "replies all ones": Variant((1, PRODUCER_WORD, 2**64 - 1)),
    "replies that were never written": Variant((1, PRODUCER_WORD, 4096 << 1)),
}


def scene(folder: Path, transport: str, what: tuple[int, int, int], refusal: Refusal) -> None:
    """The call ends with an error that says so."""
    which, offset, value = what
    with contextlib.ExitStack() as stack:
        calls = stack.enter_context(RingConsumer.create(None, 64 << 10, epoch=EPOCH))
        replies = stack.enter_context(RingProducer.create(None, 64 << 10, epoch=EPOCH))

        def serve(control: socket.socket) -> None:
            control.recv(1 << 16)
            fds = [calls.fileno(), replies.fileno()]
            socket.send_fds(control, [welcome(transport)], fds)
            calls.acquire(20.0).release()
            with mmap.mmap(fds[which], PAGE) as page, memoryview(page).cast("Q") as words:
                words[offset // 8] = value
            wait_until_gone(control)

        with (
            listening(folder, serve) as address,
            moeshm.connect(address, transport=transport) as client,
            pytest.raises(WorkerDied, match=refusal.says),
        ):
            client.compute(*INPUTS)
