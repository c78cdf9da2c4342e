"""Welcomes a client to a stream with an fd that is none: a file, memory, another kind of socket.

What is read from it, or how long that waits, would be anything.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import moeshm
from moeshm.errors import Corrupt, MoeshmError, WorkerDied
from tests.crash.processes import within
from tests.hostile.attack import BOTH, Refusal, Variant
from tests.hostile.lying import INPUTS, listening, own_fds, sending, welcome

SIDE, TRANSPORTS = "worker", BOTH[1:]
REFUSAL = Refusal(Corrupt, "is no UNIX stream socket")


def _socket(family: int, kind: int, listens: bool = False) -> int:
    sock = socket.socket(family, kind)
    if listens:
        sock.bind("")
        sock.listen()
    return sock.detach()


def _pair(kind: int) -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    ours.close()
    return theirs.detach()


VARIANTS: dict[str, Variant] = {
    "a pipe": Variant(lambda: os.open("/dev/null", os.O_RDWR)),
    "a file": Variant(lambda: os.open("/tmp", os.O_TMPFILE | os.O_RDWR)),
    "a folder": Variant(lambda: os.open("/", os.O_RDONLY)),
    "/dev/zero": Variant(lambda: os.open("/dev/zero", os.O_RDWR)),
    "memory": Variant(lambda: os.memfd_create("x")),
    "datagrams": Variant(lambda: _socket(socket.AF_UNIX, socket.SOCK_DGRAM)),
    "packets": Variant(lambda: _pair(socket.SOCK_SEQPACKET)),
    "the network": Variant(lambda: _socket(socket.AF_INET, socket.SOCK_STREAM)),
    "a socket that listens": Variant(
        lambda: _socket(socket.AF_UNIX, socket.SOCK_STREAM, True), "stream is gone", WorkerDied
    ),
    "one that nobody connected": Variant(
        lambda: _socket(socket.AF_UNIX, socket.SOCK_STREAM), "stream is gone", WorkerDied
    ),
    "one whose other end is closed": Variant(
        lambda: _pair(socket.SOCK_STREAM), "stream is gone", WorkerDied
    ),
}


def scene(folder: Path, transport: str, make: Callable[[], int], refusal: Refusal) -> None:
    """At once, or with the first call."""
    before = own_fds()
    with contextlib.ExitStack() as stack:
        fd = make()
        stack.callback(os.close, fd)
        with (
            listening(folder, sending([welcome(transport)], [fd])) as address,
            within(10.0),
            pytest.raises(refusal.error or MoeshmError, match=refusal.says),
            moeshm.connect(address, transport=transport, timeout_s=5.0) as client,
        ):
            client.compute(*INPUTS)
    assert own_fds() == before
