"""The memory that was used last is used again: an empty ring starts from its beginning."""

from __future__ import annotations

import os

import pytest

from moeshm import RingConsumer, RingProducer
from moeshm._ring import Record
from moeshm.errors import RingClosed, RingEmpty
from tests.ring import rings

CAPACITY = 1 << 20
#: Two of them are more than what is kept in the caches.
LARGE = 100_000


def send(producer: RingProducer, consumer: RingConsumer, payload: bytes) -> Record:
    producer.write([payload])
    record = consumer.acquire(0)
    assert bytes(record) == payload
    return record


def address(record: Record) -> int:
    return int(record.array("u1", (len(record),)).ctypes.data)


@pytest.mark.parametrize("first_position", [0, rings.POSITIONS - 64])
def test_an_empty_ring_starts_from_its_beginning(first_position: int) -> None:
    with rings.pair(CAPACITY, first_position=first_position) as ends:
        addresses = set()
        for _ in range(20):
            record = send(*ends, os.urandom(LARGE))
            addresses.add(address(record))
            record.release()
        assert len(addresses) == 1


def test_small_records_ask_rarely() -> None:
    with rings.pair(CAPACITY) as ends:
        addresses = []
        for _ in range(2000):
            record = send(*ends, os.urandom(100))
            addresses.append(address(record))
            record.release()
        assert len(set(addresses)) == (128 << 10) // rings.record_bytes(100)


def test_a_ring_that_is_not_empty_goes_on() -> None:
    with rings.pair(CAPACITY) as ends:
        held = [send(*ends, bytes([number]) * LARGE) for number in range(8)]
        assert len({address(record) for record in held}) == 8
        for number, record in enumerate(held):
            assert bytes(record) == bytes([number]) * LARGE
            record.release()
        assert send(*ends, b"again").sequence == 8


def test_what_is_aborted_at_the_beginning_leaves_it_there() -> None:
    with rings.pair(CAPACITY) as (producer, consumer):
        first = send(producer, consumer, bytes(2 * LARGE))
        place = address(first)
        first.release()
        for _ in range(3):
            producer.reserve(LARGE).abort()
            with pytest.raises(RingEmpty):
                consumer.acquire(0)
        older, newer = producer.reserve(LARGE), producer.reserve(8)
        older.abort()
        newer.commit()
        # Large payloads start 64 bytes behind their header, and small ones 32.
        following = consumer.acquire(0)
        assert address(following) == place - 64 + rings.record_bytes(LARGE) + 32
        following.release()
        record = send(producer, consumer, bytes(LARGE))
        assert address(record) == place


def test_closing_at_the_beginning_sends_nothing() -> None:
    with rings.pair(CAPACITY) as (producer, consumer):
        send(producer, consumer, bytes(2 * LARGE)).release()
        _reserved = producer.reserve(LARGE)
        producer.close()
        with pytest.raises(RingClosed):
            consumer.acquire(0)
