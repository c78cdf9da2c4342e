"""What tests of the wire share: layers, records as they arrive, two ends of each transport."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moeshm import handshake, protocol
from moeshm.handshake import Hello
from moeshm.layers import LayerInfo
from moeshm.transport import Transport
from moeshm.transport.shared import SharedTransport
from moeshm.transport.stream import StreamMessage, StreamTransport


def dense_info(hidden_size: int, num_experts: int, top_k: int) -> LayerInfo:
    """A layer whose experts are all here, in the model's order."""
    return partial_info(hidden_size, num_experts, range(num_experts), top_k)


def partial_info(
    hidden_size: int, num_experts: int, experts: Sequence[int], top_k: int
) -> LayerInfo:
    """A layer of which these experts are here."""
    return LayerInfo(
        hidden_size=hidden_size,
        intermediate_size=4,
        num_experts=num_experts,
        top_k=top_k,
        experts=tuple(experts),
    )


def message(data: bytes, kind: int) -> StreamMessage:
    """A record with these bytes, as a transport delivers it."""
    record = StreamMessage(data)
    record.describe(kind, 0, 0)
    return record


def call_message(*arguments: Any, **named: Any) -> StreamMessage:
    """What arrives when a client sends `protocol.pack_call` of these arguments."""
    parts = protocol.pack_call(*arguments, **named)
    return message(b"".join(bytes(part) for part in parts), protocol.CALL)


class Ends(NamedTuple):
    """Both ends of a transport, in this process."""

    client: Transport
    worker: Transport


#: Of the rings; a stream's records may be longer.
CAPACITY = 4 << 20


@contextlib.contextmanager
def connected(name: str, capacity: int = CAPACITY, epoch: int = 0xE60C) -> Iterator[Ends]:
    """Two ends of the transport of that name, closed at the end."""
    worker: Transport
    client: Transport
    if name == "shared":
        worker, fds = SharedTransport.create(capacity, capacity, epoch, -1, -1)
        client = SharedTransport.attach(fds, epoch, -1, -1)
    else:
        worker, fds = StreamTransport.create(epoch)
        client = StreamTransport.attach(fds[0], epoch)
    try:
        yield Ends(client, worker)
    finally:
        client.close()
        worker.close()


#: No thread of a test takes so long, unless it hangs.
PATIENCE_S = 30.0


@contextlib.contextmanager
def meanwhile(*targets: Callable[[], object]) -> Iterator[None]:
    """Each in a thread of its own during the block, whose end raises what they raise."""
    failures: list[BaseException] = []

    def guarded(target: Callable[[], object]) -> None:
        try:
            target()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join(PATIENCE_S)
        if failures:
            raise failures[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"


def send(transport: Transport, records: Iterable[tuple[int, bytes]]) -> None:
    """Types and bytes, a record each."""
    for kind, data in records:
        transport.write((data,), kind)


def take(transport: Transport, timeout_s: float | None = PATIENCE_S) -> tuple[int, bytes]:
    """Type and bytes of the next record."""
    record = transport.acquire(timeout_s)
    kind, data = record.type, bytes(memoryview(record))
    record.release()
    return kind, data


def pattern(size: int, seed: int = 0) -> bytes:
    """Bytes that tell where each of them belongs, nearly."""
    return np.random.default_rng((size, seed)).bytes(size)


# --- handshake packets --------------------------------------------------------------------

HELLO = Hello(protocol=1, version="0.1", transport="auto", batch_capacity=64)
MORE, LAST = b"\1", b"\0"
WHOLE = LAST + handshake.encode_control(HELLO)


def packets(*data: bytes) -> Callable[[socket.socket], None]:
    """Sends these."""

    def send(sock: socket.socket) -> None:
        for each in data:
            sock.send(each)

    return send


def with_fds(*packets_and_counts: tuple[bytes, int]) -> Callable[[socket.socket], None]:
    """Sends packets with so many fds each."""

    def send(sock: socket.socket) -> None:
        with open("/dev/null", "rb") as null:
            for data, count in packets_and_counts:
                socket.send_fds(sock, [data], [null.fileno()] * count)

    return send


def n_fds() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))
