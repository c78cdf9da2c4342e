"""Records in place: views without a copy, bounds, and whose the memory is when."""

from __future__ import annotations

import gc
import os
from typing import Any

import numpy as np
import pytest

from moeshm import RingConsumer, RingProducer
from moeshm._ring import MAX_OUTSTANDING, Record, Reservation
from moeshm.errors import RingClosed, RingEmpty, RingError, RingFull
from tests.ring import rings
from tests.ring.rings import RawSegment

Ring = tuple[RingProducer, RingConsumer]


def send(ring: Ring, payload: bytes) -> Record:
    """Through the ring."""
    producer, consumer = ring
    producer.write([payload])
    return consumer.acquire(0)


# --- sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [4096, 1 << 20])
def test_a_message_may_be_as_large_as_the_capacity(capacity: int) -> None:
    payload = os.urandom(capacity)
    with rings.pair(capacity) as ring:
        for _ in range(3):
            with send(ring, payload) as record:
                assert bytes(record) == payload


def test_a_larger_message_is_refused(ring: Ring) -> None:
    producer, _ = ring
    for size in (rings.PAGE + 1, (1 << 64) - 1):
        with pytest.raises(RingError, match=f"{size} bytes exceeds the ring's capacity of 4096"):
            producer.reserve(size)
    with pytest.raises(RingError, match="4097 bytes exceeds"):
        producer.write([bytes(rings.PAGE), b"1"])
    assert producer.outstanding == 0


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_sizes_around_a_cache_line(ring: Ring, size: int) -> None:
    payload = os.urandom(size)
    record = send(ring, payload)
    assert bytes(record) == payload
    assert len(record) == size
    address = record.array("u1", (size,)).ctypes.data
    assert address % 64 == (32 if size <= 64 else 0)


def test_type_flags_and_sequence_go_along(ring: Ring) -> None:
    producer, consumer = ring
    for number in range(3):
        producer.write([], type=2**32 - 1 - number, flags=2**31 - 1)
        record = consumer.acquire(0)
        assert (record.type, record.flags) == (2**32 - 1 - number, 2**31 - 1)
        assert (record.sequence, len(record)) == (number, 0)
    with pytest.raises(RingError, match="flags=0x80000000; they must be below"):
        producer.write([], flags=1 << 31)


def test_write_joins_its_parts(ring: Ring) -> None:
    producer, consumer = ring
    parts: list[Any] = [b"a", bytearray(b"bc"), memoryview(b"def"), np.arange(3, dtype="<u2"), b""]
    producer.write(parts)
    assert bytes(consumer.acquire(0)) == b"abcdef\0\0\1\0\2\0"
    producer.write([b"12"] * 8)
    assert bytes(consumer.acquire(0)) == b"12" * 8
    with pytest.raises(RingError, match="more than 8 parts"):
        producer.write([b"1"] * 9)
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        producer.write([np.zeros((4, 4))[:, 1]])
    with pytest.raises(TypeError):
        producer.write(["text"])  # type: ignore[list-item]
    assert producer.outstanding == 0


def test_a_failed_write_lets_go_of_its_parts(ring: Ring) -> None:
    producer, _ = ring
    part = bytearray(5000)
    with pytest.raises(RingError, match="exceeds"):
        producer.write([part, part])
    part.append(0)  # refused while there is a view of it


# --- how many ---------------------------------------------------------------------------


def test_so_many_may_be_open_on_each_side_and_no_more() -> None:
    with rings.pair(65536) as (producer, consumer):
        reservations = [producer.reserve(8) for _ in range(MAX_OUTSTANDING)]
        assert producer.outstanding == MAX_OUTSTANDING
        with pytest.raises(RingError, match="64 reservations are open"):
            producer.reserve(8)
        for reservation in reversed(reservations):
            reservation.commit()
        producer.write([b"one more"])
        records = [consumer.acquire(0) for _ in range(MAX_OUTSTANDING)]
        with pytest.raises(RingError, match="64 records are open"):
            consumer.acquire(0)
        for record in reversed(records):
            record.release()
        assert bytes(consumer.acquire(0)) == b"one more"


def test_aborted_records_take_no_place_among_those_that_are_open() -> None:
    with rings.pair(65536) as (producer, consumer):
        records = []
        for number in range(MAX_OUTSTANDING):
            aborted, sent = producer.reserve(8), producer.reserve(8)
            memoryview(sent)[:] = number.to_bytes(8, "little")
            aborted.abort()
            sent.commit()
            records.append(consumer.acquire(0))
            assert consumer.outstanding == number + 1
        assert [int.from_bytes(record, "little") for record in records] == [*range(64)]
        for record in records:
            record.release()
        # All of it came back, and nothing twice.
        assert consumer.outstanding == 0
        with RawSegment(producer.fileno()) as raw:
            assert raw[rings.CONSUMER_WORD] == raw[rings.PRODUCER_WORD] == 128 * 64 << 1


def test_a_thread_that_waits_is_alone_at_its_end() -> None:
    with rings.pair() as (producer, consumer):
        reservations = [producer.reserve(40) for _ in range(MAX_OUTSTANDING - 1)]
        waiting = rings.sleeping(producer, lambda: producer.reserve(rings.PAGE))
        with pytest.raises(RingError, match="another thread waits at this end"):
            producer.reserve(8)
        # Ending what is held is for any thread.
        for reservation in reservations:
            reservation.commit()
        while rings.raised_by(lambda: consumer.acquire(0).release()) is None:
            pass
        assert len(waiting.result()) == rings.PAGE


# --- whose memory -----------------------------------------------------------------------


def test_out_of_order_commits_are_published_in_order(ring: Ring) -> None:
    producer, consumer = ring
    first, second, third = (producer.reserve(1) for _ in range(3))
    for reservation, text in ((third, b"3"), (second, b"2")):
        with reservation as view:
            view[:] = text
    with pytest.raises(RingEmpty):
        consumer.acquire(0)
    with first as view:
        view[:] = b"1"
    assert [bytes(consumer.acquire(0)) for _ in range(3)] == [b"1", b"2", b"3"]


def test_out_of_order_releases_free_in_order(ring: Ring) -> None:
    producer, consumer = ring
    for _ in range(2):
        producer.write([bytes(rings.PAGE - 64)])
    older, newer = consumer.acquire(0), consumer.acquire(0)
    newer.release()
    with pytest.raises(RingFull):
        producer.reserve(64, timeout_s=0)
    older.release()
    producer.reserve(rings.PAGE, timeout_s=0)


def test_a_record_that_is_viewed_cannot_be_released(ring: Ring) -> None:
    record = send(ring, b"viewed")
    view, array = memoryview(record), record.array("u1", (6,))
    with pytest.raises(BufferError, match="2 views of record 0 are in use"):
        record.release()
    view.release()
    with pytest.raises(BufferError, match="1 views"), record:
        pass
    assert bytes(record) == b"viewed"
    del array
    record.release()
    assert ring[1].outstanding == 0


def test_a_reservation_that_is_viewed_cannot_be_committed(ring: Ring) -> None:
    producer, consumer = ring
    reservation = producer.reserve(4)
    array = reservation.array("<u4", (1,))
    array[0] = 7
    slice_of_it = array[:1]
    del array
    with pytest.raises(BufferError, match="1 views of record 0"):
        reservation.commit()
    with pytest.raises(RingEmpty):
        consumer.acquire(0)
    del slice_of_it
    reservation.commit()
    assert bytes(consumer.acquire(0)) == b"\7\0\0\0"


def test_a_view_that_outlives_a_with_block_is_an_error_and_can_be_put_right(ring: Ring) -> None:
    producer, consumer = ring
    reservation = producer.reserve(4)
    with pytest.raises(BufferError), reservation as view:
        kept = np.frombuffer(view, "u1")
    kept[:] = 5
    del kept, view
    reservation.commit()
    assert bytes(consumer.acquire(0)) == b"\5\5\5\5"


def test_an_ended_record_is_of_no_more_use(ring: Ring) -> None:
    producer, _ = ring
    committed, aborted = producer.reserve(8), producer.reserve(8)
    committed.commit()
    aborted.abort()
    released = ring[1].acquire(0)
    released.release()
    ended: list[Reservation | Record] = [committed, aborted, released]
    for held in ended:
        for use in (
            lambda held=held: memoryview(held),
            lambda held=held: held.array("u1", (1,)),
            lambda held=held: held.release() if isinstance(held, Record) else held.commit(),
            lambda held=held: held.release() if isinstance(held, Record) else held.abort(),
        ):
            assert rings.raised_by(use) is RingError
    with pytest.raises(RingError, match="released already"):
        released.copy_to(bytearray(1))


def test_a_forgotten_record_frees_its_place(ring: Ring) -> None:
    producer, consumer = ring
    producer.write([bytes(rings.PAGE)])
    consumer.acquire(0)
    assert consumer.outstanding == 0
    producer.reserve(rings.PAGE, timeout_s=0)
    assert producer.outstanding == 0
    producer.write([b"next"], timeout_s=0)
    assert bytes(consumer.acquire(0)) == b"next"


def test_a_forgotten_reservation_does_not_hold_up_later_ones(ring: Ring) -> None:
    producer, consumer = ring
    reservation = producer.reserve(64)
    producer.write([b"later"])
    del reservation
    assert bytes(consumer.acquire(0)) == b"later"


def test_a_record_in_a_reference_cycle_frees_its_place(ring: Ring) -> None:
    producer, consumer = ring
    reservation = producer.reserve(8)
    reservation.__enter__()  # its view refers to it, and it to its view
    cycle: list[object] = [send(ring, b"") if producer.outstanding == 0 else None, reservation]
    cycle.append(cycle)
    del reservation, cycle
    gc.collect()
    assert producer.outstanding == consumer.outstanding == 0


def test_an_exception_aborts(ring: Ring) -> None:
    producer, consumer = ring

    def fail() -> None:
        with producer.reserve(8) as view:
            view[:4] = b"half"
            raise KeyError

    assert rings.raised_by(fail) is KeyError
    assert producer.outstanding == 0
    with pytest.raises(RingEmpty):
        consumer.acquire(0)


def test_views_stay_good_after_close() -> None:
    with rings.pair() as ring:
        record = send(ring, b"stays")
        reservation = ring[0].reserve(8)
        view, array = memoryview(reservation), record.array("u1", (5,))
    view[:] = b"to no-on"
    assert bytes(array) == b"stays"
    del view, array
    record.release()
    with pytest.raises(RingClosed):
        reservation.commit()
