"""Answers a hello with garbage, with parts that never end, or not at all.

Whoever connects would wait for ever, or take whatever comes for a session.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import moeshm
from moeshm.errors import MoeshmError, ProtocolError, SessionError
from tests.crash.processes import within
from tests.hostile.attack import BOTH, Refusal, Variant
from tests.hostile.lying import listening, own_fds, sending, wait_until_gone

SIDE, TRANSPORTS = "worker", BOTH[:1]
REFUSAL = Refusal(ProtocolError, "no handshake message")


def _more_for_ever(sock: socket.socket) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while True:
            sock.send(b"\1")


def _goes(sock: socket.socket) -> None:
    sock.recv(1 << 16)


VARIANTS = {
    "another protocol": Variant(sending([b"HTTP/1.1 400 Bad Request\r\n"]), "handshake packet"),
    "no msgpack": Variant(sending([b"\0\xc1\xc1"])),
    "nested without end": Variant(sending([b"\1" + b"\x91" * 30_000] * 10 + [b"\0"])),
    "the client's part": Variant(
        sending([b"\0\x81\xa4type\xa7goodbye"[:1] + b"\x82\xa4type\xa7goodbye\xa6reason\xa1x"]),
        "expected welcome, got goodbye",
    ),
    "a packet too long": Variant(sending([b"\0" + b"x" * 60_000]), "too long"),
    "17 MiB": Variant(sending([b"\1" + b"x" * 32_000] * 560), "at most 16777216 bytes"),
    "nothing": Variant(wait_until_gone, "did not come in time", SessionError),
    "more for ever": Variant(_more_for_ever, "did not come in time", SessionError),
    "the end": Variant(_goes, "closed the connection", SessionError),
}


def scene(
    folder: Path, transport: str, serve: Callable[[socket.socket], None], refusal: Refusal
) -> None:
    """At the deadline at the latest."""
    before = own_fds()
    with (
        listening(folder, serve) as address,
        within(10.0),
        pytest.raises(refusal.error or MoeshmError, match=refusal.says),
    ):
        moeshm.connect(address, transport=transport, timeout_s=0.3)
    assert own_fds() == before
