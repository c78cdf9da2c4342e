"""Fills the ring for replies with records that are taken back, as fast as the client skips them.

They are skipped without a word: a client that skipped on and on would miss its deadline.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

from moeshm import protocol
from moeshm.errors import DeadlineExceeded, PeerDied, RingError
from moeshm.session import Session
from tests.crash.processes import within
from tests.hostile.attack import BOTH, Refusal
from tests.hostile.lying import INPUTS, lied_to

SIDE, TRANSPORTS = "worker", BOTH[:1]
REFUSAL = Refusal(DeadlineExceeded, "no answer within")


def scene(folder: Path, transport: str, _: None, refusal: Refusal) -> None:
    """The deadline holds none the less."""
    is_over = threading.Event()

    def storm(opened: Session, _call_id: int) -> None:
        with contextlib.suppress(RingError, PeerDied):
            while not is_over.is_set():
                # In order, so that they are published, and not as if they had never been.
                held = [opened.transport.reserve(0, protocol.REPLY, 0, 1.0) for _number in range(9)]
                for each in held:
                    each.abort()

    with lied_to(folder, transport, storm) as client, within(10.0):
        try:
            with pytest.raises(DeadlineExceeded, match=refusal.says):
                client.compute(*INPUTS, timeout_s=0.3)
        finally:
            is_over.set()
