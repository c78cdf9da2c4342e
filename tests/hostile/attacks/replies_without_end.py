"""Floods a client with replies instead of taking its call.

While it waits for room to send, a client takes in what comes: without a bound that never ends.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
from pathlib import Path

import msgspec
import pytest

import moeshm
from moeshm.errors import DeadlineExceeded, MoeshmError, WorkerDied
from moeshm.transport import stream
from moeshm.transport.stream import StreamTransport
from tests.crash.arithmetic import MANY_TOKENS, WIDE, ArithmeticBackend, make_inputs
from tests.crash.processes import within
from tests.hostile.attack import BOTH, Refusal, Variant
from tests.hostile.attacker import RECORD, REPLY
from tests.hostile.lying import EPOCH, listening, reply_header, wait_until_gone, welcome

SIDE, TRANSPORTS = "worker", BOTH[1:]
REFUSAL = Refusal(WorkerDied, "instead of taking one")
VARIANTS = {
    "small ones": Variant((0, 30.0)),
    "large ones": Variant((1 << 20, 30.0)),
    "until the deadline": Variant((0, 0.3), "no answer within 0.3 s", DeadlineExceeded),
}


def scene(folder: Path, transport: str, what: tuple[int, float], refusal: Refusal) -> None:
    """It ends at the deadline, or long before the client's memory."""
    size, timeout_s = what
    sequences, really_read = itertools.count(), StreamTransport._read
    most = stream._MAX_INBOX_BYTES if timeout_s < 1 else 4 << 20
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    layers = {WIDE: msgspec.to_builtins(ArithmeticBackend().layers[WIDE])}

    def serve(control: socket.socket) -> None:
        with ours:
            control.recv(1 << 16)
            packet = welcome(transport, layers=layers, max_tokens=MANY_TOKENS)
            socket.send_fds(control, [packet], [theirs.fileno()])
            theirs.close()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while timeout_s > 1:
                    send()
            wait_until_gone(control)

    def send() -> None:
        header = RECORD.pack(64 + size, REPLY, 0, EPOCH, next(sequences))
        ours.sendall(header + reply_header(call_id=1 << 40) + bytes(size))

    def read(transport: StreamTransport, until: float) -> bool:
        send()
        return really_read(transport, until)

    with (
        pytest.MonkeyPatch.context() as patch,
        listening(folder, serve) as address,
        within(20.0),
        moeshm.connect(address, transport=transport) as client,
    ):
        patch.setattr(stream, "_MAX_INBOX_BYTES", most)
        if timeout_s < 1:
            # Faster than another thread can send: there is always another.
            patch.setattr(StreamTransport, "_read", read)
        # Larger than the socket's buffers: its sender has to wait for room in the midst of it.
        inputs = make_inputs(WIDE, 1, MANY_TOKENS)
        with pytest.raises(refusal.error or MoeshmError, match=refusal.says):
            client.compute(*inputs, timeout_s=timeout_s)
