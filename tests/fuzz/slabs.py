"""Target: both sides of a slab, whose flags and data the other side writes as it likes."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from moeshm import descriptors
from moeshm._claims import Allocator, Claim
from moeshm._ring import RingConsumer, RingProducer
from moeshm.backends import SlabCall
from moeshm.descriptors import DESCRIPTOR
from moeshm.errors import InvalidCall, ProtocolError
from moeshm.handshake import Hello
from moeshm.holdings import Holdings
from moeshm.slab_server import SlabServer
from moeshm.transport.slab import (
    DONE,
    FLAGS_BYTES,
    GIVEN,
    PAGE_BYTES,
    REFUSED,
    SLOT_BYTES,
    SLOTS,
    TAKEN,
    TOLD,
    Segment,
)
from tests.crash.arithmetic import FREE, HIDDEN_SIZE, ArithmeticBackend
from tests.fuzz.choices import Choices
from tests.fuzz.keeper import Keeper
from tests.fuzz.records import DESCRIPTOR_FORM, DESCRIPTOR_WIDTHS

MOST_TOKENS = 8
_WORD = struct.Struct("<I")
_FLAGS = (GIVEN, DONE, REFUSED, TAKEN)
_HELLO = Hello(protocol=1, version="", transport="auto", batch_capacity=8, slab="pinned")


class _Uninterrupted:
    """`BetweenSteps` of a worker with nothing else to do."""

    def is_due(self) -> bool:
        """As `BetweenSteps.is_due`."""
        return False

    def __call__(self) -> None:
        """As `BetweenSteps`."""


class _Worker:
    """A worker's side of one session, and what the client has of it."""

    def __init__(self) -> None:
        self.backend = ArithmeticBackend()
        self.view = Holdings(self.backend, None).lease()
        self.server = SlabServer(self.backend)
        offer, fd, _ = self.server.offer(_HELLO, PAGE_BYTES)
        self.client = Segment.attach(fd, offer.data_bytes)
        os.close(fd)
        self.producer = RingProducer.create(None, 1 << 16, spin_us=0)
        self.consumer = RingConsumer.attach(self.producer.fileno(), spin_us=0)

    def close(self) -> None:
        """Let go of all."""
        self.server.close()
        self.client.close()
        self.producer.close()
        self.consumer.close()


_worker = Keeper(_Worker)


def close() -> None:
    """Let go of what is kept between executions."""
    _worker.close()


def seeds() -> list[bytes]:
    """Each side, honest and not."""
    more: tuple[list[int], ...] = (
        [],
        [0] * 24,
        [1, 3, 9, 0, 200, 4],
        [2, *range(60)],
        [3, 8, 120, 4, 1, 90] * 4,
    )
    return [bytes([kind, *each]) for kind in range(len(_KINDS)) for each in more]


def test_one(data: bytes) -> str:
    """What became of it; AssertionError for what must not."""
    choices = Choices(data)
    return _KINDS[choices.below(len(_KINDS))](choices)


# --- the worker's side ------------------------------------------------------------------------


def serve(choices: Choices) -> str:
    """A few descriptors, after what the client did to flags and data."""
    worker = _worker()
    outcome = ""
    for _ in range(1 + choices.below(3)):
        fields = describe(choices)
        data = worker.client.data
        n_ids = 4
        for index in range(n_ids):
            data[256 + 4 * index : 260 + 4 * index] = _WORD.pack(choices.near(index % 4, 32))
        data[512:528] = np.ones(n_ids, np.float32).tobytes()
        flags = worker.client.memory
        for _ in range(choices.below(4)):
            at = SLOT_BYTES * choices.below(SLOTS) + _FLAGS[choices.below(4)]
            flags[at : at + 4] = _WORD.pack(choices.number(32))
        given = choices.near(fields["sequence"], 32)
        at = SLOT_BYTES * (fields["slot"] % SLOTS)
        flags[at + GIVEN : at + GIVEN + 4] = _WORD.pack(given)
        packed = choices.edit(DESCRIPTOR_FORM.pack(*fields.values(), b""))
        outcome = _serve_one(worker, packed)
    return f"serve: {outcome}"


def describe(choices: Choices) -> dict[str, int]:
    """The fields of a descriptor that is right but for what is chosen."""
    fields = dict.fromkeys(DESCRIPTOR_WIDTHS, 0)
    fields.update(version=1, length=128, layer=FREE, call_id=9, n_tokens=2, top_k=2)
    fields.update(hidden_size=HIDDEN_SIZE, slot=3, sequence=5, id_space=choices.below(2))
    fields.update(dtype=0, topk_ids=256, topk_weights=512, out=1024)
    choices.change(fields, DESCRIPTOR_WIDTHS)
    return fields


def _serve_one(worker: _Worker, packed: bytes) -> str:
    """What `SessionServer` does of a descriptor."""
    server = worker.server
    worker.producer.write([packed], DESCRIPTOR, timeout_s=0)
    record = worker.consumer.acquire(0)
    try:
        call = server.read_plain(record, MOST_TOKENS)
        descriptor = descriptors.read(record) if call is None else None
    except ProtocolError as error:
        return f"ProtocolError: {_gist(error)}"
    finally:
        record.release()
    if descriptor is not None:
        server.check_open()
        try:
            if descriptor.view != 0:
                raise InvalidCall("no such view")
            call = server.call_of(descriptor, worker.view, MOST_TOKENS)
        except InvalidCall as error:
            server.tell_failed(descriptor.places.slot, descriptor.sequence)
            _check_flags(worker, descriptor.places.slot, descriptor.sequence, TOLD)
            return f"InvalidCall: {_gist(error)}"
        except ProtocolError as error:
            return f"ProtocolError: {_gist(error)}"
    assert call is not None
    _check_places(call)
    if not server.wait_for_arrays(call, 0.0):
        return "nothing was given"
    try:
        server.prepare(call)
        server.compute(call, _Uninterrupted())
    except InvalidCall as error:
        server.tell_failed(call.places.slot, call.sequence)
        return f"InvalidCall: {_gist(error)}"
    _check_flags(worker, call.places.slot, call.sequence)
    return "computed"


def _check_places(call: SlabCall) -> None:
    n_rows = call.n_tokens * call.hidden_size * call.dtype.itemsize
    n_pairs = call.n_tokens * call.top_k * 4
    for offset, size in zip(call.places[1:], (n_rows, n_pairs, n_pairs, n_rows), strict=True):
        assert 0 <= offset <= offset + size <= PAGE_BYTES
    assert 0 <= call.places.slot < SLOTS


def _check_flags(worker: _Worker, slot: int, sequence: int, refused: int | None = None) -> None:
    at = SLOT_BYTES * slot
    assert _WORD.unpack_from(worker.client.memory, at + DONE) == (sequence,)
    if refused is not None:
        assert _WORD.unpack_from(worker.client.memory, at + REFUSED) == (refused,)


# --- the client's side ------------------------------------------------------------------------


def claim(choices: Choices) -> str:
    """Claims of any sizes, of a slab whose flags the worker sets to anything."""
    data_bytes = choices.near(1 << 14, 40) or 1
    memory = bytearray(FLAGS_BYTES)
    allocator = Allocator(memory, data_bytes, choices.near(0, 32) % 0xFFFFFFFE)
    held: list[tuple[Claim, list[tuple[int, int]]]] = []
    outcome = "nothing"
    while choices.are_left():
        step = choices.byte()
        if step < 96:
            # Of a layer as the worker describes it, and of as many tokens as a call may have.
            n_tokens, hidden_size = 1 + choices.near(2, 12), choices.near(16, 32) or 1
            top_k, dtype = choices.near(2, 16) or 1, choices.below(3)
            made = allocator.claim(n_tokens, hidden_size, top_k, dtype)
            most = allocator.most_tokens(hidden_size, top_k, dtype)
            if made is None:
                outcome = "no room"
                assert held or n_tokens > most, "no room in an empty slab"
            else:
                outcome = "claimed"
                ranges = _ranges(made, n_tokens, hidden_size, top_k, dtype)
                _check_apart(ranges, [each for _, others in held for each in others], data_bytes)
                held.append((made, ranges))
                assert made.refused == 0
        elif step < 128 and held:
            held.pop(0)
            allocator.free_oldest()
        elif step < 192:
            at = SLOT_BYTES * choices.below(SLOTS) + _FLAGS[choices.below(4)]
            memory[at : at + 4] = _WORD.pack(choices.number(32))
        elif held:
            _look(*held[choices.below(len(held))], choices)
    return f"claim: {outcome}, {len(held)} held"


def _ranges(
    made: Claim, n_tokens: int, hidden_size: int, top_k: int, dtype: int
) -> list[tuple[int, int]]:
    rows, pairs = n_tokens * hidden_size * (2 if dtype else 4), n_tokens * top_k * 4
    assert made.out_bytes == rows
    assert made.given_bytes == rows + 2 * pairs
    places: Any = made.places
    return [
        (offset, offset + size)
        for offset, size in zip(places[1:], (rows, pairs, pairs, rows), strict=True)
    ]


def _check_apart(
    ranges: list[tuple[int, int]], others: list[tuple[int, int]], data_bytes: int
) -> None:
    for number, (begin, end) in enumerate(ranges):
        assert 0 <= begin <= end <= data_bytes, "an array beyond the slab"
        assert begin % 256 == 0
        for its_begin, its_end in others + ranges[:number]:
            assert begin >= its_end or its_begin >= end, "two arrays in one place"


def _look(made: Claim, _ranges: list[tuple[int, int]], choices: Choices) -> None:
    which = choices.near(_FLAGS[choices.below(4)], 16)
    try:
        assert 0 <= made.flag(which) <= FLAGS_BYTES - 4
        made.has_reached(which)
        made.wait(which, 0, 0)
        made.set(which, choices.number(32))
    except IndexError:
        assert which % 4 or which >= SLOT_BYTES
    assert 0 <= made.refused < 1 << 32
    record = made.describe(choices.number(64), choices.number(32), 1e6, choices.number(32), False)
    assert len(record) == 128


def _gist(error: Exception) -> str:
    words = str(error).split()[:4]
    return " ".join(word for word in words if word.isalpha())


_KINDS: tuple[Callable[[Choices], str], ...] = (serve, claim)
