"""Peers that mean no good: what they send to a worker's socket, with none of moeshm's checks."""

from __future__ import annotations

import os
import queue
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import msgspec

_LIMIT_S = 2.0
#: Of a record: length, type, flags, epoch, sequence; docs/protocol.md.
_RECORD = struct.Struct("<QIIQQ")


class Hostiles:
    """Attacks one after the other, in a thread of their own: a worker may stand still."""

    def __init__(self) -> None:
        #: By name, those of which all was sent.
        self.made: Counter[str] = Counter()
        self._orders: queue.SimpleQueue[tuple[str, str, int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def attack(self, name: str, path: str, seed: int) -> None:
        """Begin one of ATTACKS on the worker that listens there."""
        self._orders.put((name, path, seed))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="moeshm-soak-hostile")
            self._thread.start()

    def rest(self) -> None:
        """Until those that were begun are over."""
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            name, path, seed = order
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
                    control.settimeout(_LIMIT_S)
                    control.connect(path)
                    for _ in ATTACKS[name](control, random.Random(seed)):
                        self.made[name] += 1
            except OSError:
                # The worker is down, or has ended the connection, as it should.
                continue


def _garbage(control: socket.socket, rng: random.Random) -> Iterator[None]:
    for _ in range(rng.randint(1, 5)):
        control.send(rng.randbytes(rng.randint(1, 4000)))
    yield
    control.recv(1)


def _half_a_handshake(control: socket.socket, rng: random.Random) -> Iterator[None]:
    hello = _hello("auto")
    # The mark says that more follows.
    control.send(b"\1" + hello[: rng.randint(0, len(hello))])
    yield


def _silence(control: socket.socket, rng: random.Random) -> Iterator[None]:
    yield
    control.settimeout(rng.uniform(0.01, 0.3))
    control.recv(1)


def _broken_records(control: socket.socket, rng: random.Random) -> Iterator[None]:
    """A session over a stream like anyone's, and then records that cannot be."""
    control.send(b"\0" + _hello("stream"))
    _, fds, _, _ = socket.recv_fds(control, 1 << 16, 4)
    for fd in fds[1:]:
        os.close(fd)
    if not fds:
        return
    with socket.socket(fileno=fds[0]) as stream:
        stream.settimeout(_LIMIT_S)
        length = rng.choice((0, 1, 63, 1 << 40, 2**64 - 1))
        stream.sendall(_RECORD.pack(length, rng.randint(0, 9), 0, rng.getrandbits(64), 0))
        stream.sendall(rng.randbytes(rng.randint(0, 2000)))
        yield
        stream.recv(1)


def _gone_at_once(control: socket.socket, rng: random.Random) -> Iterator[None]:
    control.send(b"\0" + _hello(rng.choice(("shared", "stream"))))
    yield


def _hello(transport: str) -> bytes:
    fields = {"type": "hello", "protocol": 1, "version": "soak", "transport": transport}
    return msgspec.msgpack.encode({**fields, "batch_capacity": 64})


#: By name: what is done with a connection, which is closed then; yields once all is sent.
ATTACKS: dict[str, Callable[[socket.socket, random.Random], Iterator[None]]] = {
    "garbage": _garbage,
    "half a handshake": _half_a_handshake,
    "silence": _silence,
    "broken records": _broken_records,
    "gone at once": _gone_at_once,
}
