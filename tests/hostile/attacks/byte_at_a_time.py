"""Takes what its client sends a byte at a time, for ever.

Every byte is progress: who waits for the next only, waits for all of them, beyond any deadline.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import moeshm
from moeshm import session
from moeshm.errors import DeadlineExceeded, WorkerDied
from moeshm.session import ControlSocket
from moeshm.transport.stream import StreamTransport
from tests.crash.arithmetic import FREE, MANY_TOKENS, WIDE, ArithmeticBackend, make_inputs
from tests.crash.processes import within
from tests.hostile.attack import Refusal, Variant
from tests.hostile.lying import listening
from tests.wire import PATIENCE_S

SIDE = "worker"
TRANSPORTS = ("stream",)
REFUSAL = Refusal(DeadlineExceeded, "")
#: Of what is sent; all of it would take minutes.
TIMEOUT_S = 0.3
PAUSE_S = 0.001

_INPUTS = make_inputs(WIDE, 1, MANY_TOKENS)
VARIANTS = {
    "a call": Variant(lambda client: client.compute(*_INPUTS, timeout_s=TIMEOUT_S)),
    "an order": Variant(lambda client: client.hold({FREE: range(40_000)}, timeout_s=TIMEOUT_S)),
}


def _take_slowly(sock: socket.socket) -> None:
    control = ControlSocket(sock)
    with session.accept(control, ArithmeticBackend().layers, "x", 64, PATIENCE_S) as opened:
        assert isinstance(opened.transport, StreamTransport)
        stream = opened.transport._socket
        stream.setblocking(True)
        with contextlib.suppress(ConnectionResetError):
            # Until the client hangs up.
            while stream.recv(1) and not select.select([sock], [], [], PAUSE_S)[0]:
                pass


def scene(
    folder: Path,
    transport: str,
    what: Callable[[moeshm.ExpertClient], object],
    refusal: Refusal,
) -> None:
    """The session is over at the deadline: the worker has half of it."""
    assert refusal.error is not None
    with (
        listening(folder, _take_slowly) as address,
        moeshm.connect(address, transport=transport) as client,
    ):
        stream = client._link.session.transport
        assert isinstance(stream, StreamTransport)
        # An order is shorter than what a socket's buffer usually holds.
        stream._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        with within(PATIENCE_S), pytest.raises(refusal.error):
            what(client)
        assert isinstance(client._link.loss, WorkerDied)
