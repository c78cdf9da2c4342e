"""Sends file descriptors along with the bytes of its replies.

A client that received them would run out of its own, one for each reply.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from pathlib import Path
from typing import Any

import numpy as np

import moeshm
from tests.crash.processes import within
from tests.hostile.attack import BOTH, Refusal, Variant
from tests.hostile.attacker import (
    PATIENCE_S,
    RECORD,
    REPLY,
    SO_PASSRIGHTS,
    kernel_refuses_fds,
    send_fds,
)
from tests.hostile.lying import EPOCH, INPUTS, ROWS, listening, reply_header, sending, welcome
from tests.wire import meanwhile

SIDE, TRANSPORTS = "worker", BOTH[1:]
REFUSAL = Refusal(None, "dropped or refused by the kernel; the result is right")
VARIANTS = {
    "as they come": Variant(False),
    "let in by its own copy of the client's end": Variant(True),
}


def scene(folder: Path, transport: str, has_copy: bool, _: Refusal) -> None:
    """A pipe's end tells that none is kept."""
    told, held = os.pipe()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.settimeout(PATIENCE_S)

    def reply() -> None:
        length, *_ = RECORD.unpack(ours.recv(RECORD.size, socket.MSG_WAITALL))
        ours.recv(length, socket.MSG_WAITALL)
        payload = reply_header() + ROWS
        data = RECORD.pack(len(payload), REPLY, 0, EPOCH, 0) + payload
        half = len(data) // 2
        if has_copy and kernel_refuses_fds():
            theirs.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 1)
        for part in (data[:half], data[half:]):
            send_fds(ours, part, [held] * 253, kernel_refuses_fds() and not has_copy)
        os.close(held)

    with ours, theirs, contextlib.ExitStack() as stack:
        stack.callback(os.close, told)
        serve = sending([welcome(transport)], [theirs.fileno()])
        address = stack.enter_context(listening(folder, serve))
        stack.enter_context(within(10.0))
        client = stack.enter_context(moeshm.connect(address, transport=transport))
        with meanwhile(reply):
            result: Any = client.compute(*INPUTS)
        np.testing.assert_array_equal(result, INPUTS.hidden_states)
        assert select.select([told], [], [], PATIENCE_S)[0], "the client keeps an fd"
        assert os.read(told, 1) == b""
