"""Makes the stream that it gave to a client a blocking one again, by its own copy of the fd.

Whether an fd blocks is a property of what all its copies share: a read would wait for ever.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

import moeshm
from moeshm.errors import DeadlineExceeded
from tests.crash.processes import within
from tests.hostile.attack import BOTH, Refusal
from tests.hostile.lying import INPUTS, listening, sending, welcome

SIDE, TRANSPORTS = "worker", BOTH[1:]
REFUSAL = Refusal(DeadlineExceeded, "no answer within")


def scene(folder: Path, transport: str, _: None, refusal: Refusal) -> None:
    """The deadline holds none the less."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        serve = sending([welcome(transport)], [theirs.fileno()])
        with (
            listening(folder, serve) as address,
            within(10.0),
            moeshm.connect(address, transport=transport) as client,
        ):
            os.set_blocking(theirs.fileno(), True)
            # Half a record: there is something to read, and then there is not.
            ours.send(bytes(16))
            with pytest.raises(DeadlineExceeded, match=refusal.says):
                client.compute(*INPUTS, timeout_s=0.3)
