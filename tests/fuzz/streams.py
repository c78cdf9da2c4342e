"""Target: records over a stream socket, whose bytes come in any pieces and may be anything."""

from __future__ import annotations

import contextlib
import socket
import struct

from moeshm import protocol
from moeshm.errors import Corrupt, PeerDied, RingClosed, RingEmpty, RingError, RingFull
from moeshm.transport.stream import StreamTransport
from tests.fuzz.choices import Choices

EPOCH = 5
#: Of one record.
MOST = 4096
_HEADER = struct.Struct("<QIIQQ")
_WIDTHS = {"length": 64, "type": 32, "flags": 32, "epoch": 64, "sequence": 64}
_SIZES = (0, 1, 63, 64, 128, 1000, MOST, MOST + 1)


def close() -> None:
    """Nothing is kept between executions."""


def seeds() -> list[bytes]:
    """Good records, in pieces, and bad ones."""
    return [
        b"",
        bytes([1, 3, 2, 3, 4, 5, 6]),
        bytes([2, 4, *range(40)]),
        bytes([3, 2, 0, 0, 0, 1, 200]),
    ]


def test_one(data: bytes) -> str:
    """What came of one stream; AssertionError for what must not."""
    choices = Choices(data)
    drains = choices.byte() & 1 == 1
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with (
        theirs,
        contextlib.closing(StreamTransport(ours, EPOCH, drains, -1, MOST)) as transport,
    ):
        records, stream = _make(choices)
        outcome, n_taken = _play(transport, theirs, records, stream, choices)
        if outcome == "Corrupt":
            _check_is_over(transport)
        if outcome == "RingEmpty":
            _check_goes_on(transport, theirs)
    return f"{outcome} after {n_taken}"


def _make(choices: Choices) -> tuple[list[tuple[int, int, bytes]], bytes]:
    """What a receiver must find of some bytes, and the bytes."""
    stream = b""
    for sequence in range(choices.below(5)):
        size = _SIZES[choices.below(len(_SIZES))]
        fields = {"length": size, "type": 1, "flags": 0, "epoch": EPOCH, "sequence": sequence}
        choices.change(fields, _WIDTHS)
        stream += _HEADER.pack(*fields.values()) + bytes([sequence]) * size
    stream = choices.edit(stream)
    return _found(stream), stream


def _found(stream: bytes) -> list[tuple[int, int, bytes]]:
    """The records that these bytes begin with."""
    records: list[tuple[int, int, bytes]] = []
    at = 0
    while at + _HEADER.size <= len(stream):
        length, kind, flags, epoch, sequence = _HEADER.unpack_from(stream, at)
        at += _HEADER.size
        if length > MOST or (epoch, sequence) != (EPOCH, len(records)) or at + length > len(stream):
            break
        records.append((kind, flags, stream[at : at + length]))
        at += length
    return records


def _play(
    transport: StreamTransport,
    theirs: socket.socket,
    records: list[tuple[int, int, bytes]],
    stream: bytes,
    choices: Choices,
) -> tuple[str, int]:
    """Send in pieces and receive meanwhile: just what was sent comes, and in order."""
    n_taken = 0
    pieces = _cut(stream, choices)
    while True:
        piece = pieces.pop(0) if pieces else None
        if piece is not None:
            theirs.sendall(piece)
        elif choices.byte() & 1:
            theirs.close()
        try:
            while True:
                record = transport.acquire(0.0)
                assert n_taken < len(records), "a record that nobody sent"
                assert (record.type, record.flags, bytes(record)) == records[n_taken]
                assert len(record.array("u1", (len(record),))) == len(record)
                record.release()
                n_taken += 1
        except RingEmpty:
            outcome = "RingEmpty"
        except (Corrupt, PeerDied) as error:
            return type(error).__name__, n_taken
        if piece is None:
            assert n_taken == len(records), "a record was lost"
            return outcome, n_taken


def _cut(stream: bytes, choices: Choices) -> list[bytes]:
    pieces = []
    for _ in range(choices.below(8)):
        size = choices.below(256)
        pieces.append(stream[:size])
        stream = stream[size:]
    return [*pieces, stream]


def _check_is_over(transport: StreamTransport) -> None:
    for use in (
        lambda: transport.acquire(0.0),
        lambda: transport.write([b"x"], protocol.REPLY, 0, 0.0),
    ):
        try:
            use()
            raise AssertionError("a corrupt stream goes on")
        except (Corrupt, RingClosed, PeerDied):
            pass


def _check_goes_on(transport: StreamTransport, theirs: socket.socket) -> None:
    """The other way is not hurt by what came."""
    if theirs.fileno() < 0:
        return
    try:
        transport.reserve(16, protocol.REPLY, 0, 0.0).commit()
    except (RingFull, RingError, PeerDied):
        raise AssertionError("no room in an empty stream") from None
    assert len(theirs.recv(64)) == _HEADER.size + 16
