"""What mypy must make of the ring's interface; checked, never run."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type

from moeshm import RingConsumer, RingProducer
from moeshm._ring import HEADER_BYTES, MAX_CAPACITY, MAX_OUTSTANDING, Record, Reservation

assert_type(MAX_OUTSTANDING, int)
assert_type(MAX_CAPACITY, int)
assert_type(HEADER_BYTES, int)


def use_ends() -> None:
    assert_type(RingProducer.create(None, 4096), RingProducer)
    assert_type(
        RingProducer.create("/ring", 4096, epoch=1, spin_us=2.5, first_position=64), RingProducer
    )
    assert_type(RingProducer.attach("/ring", epoch=1), RingProducer)
    assert_type(RingConsumer.create(None, 4096, spin_us=0), RingConsumer)
    assert_type(RingConsumer.attach(3, spin_us=None), RingConsumer)
    with RingProducer.create(None, 1) as producer, RingConsumer.attach(producer.fileno()) as end:
        assert_type(producer, RingProducer)
        assert_type(end, RingConsumer)


def use_properties(end: RingConsumer | RingProducer) -> None:
    assert_type(end.capacity, int)
    assert_type(end.name, str | None)
    assert_type(end.epoch, int)
    assert_type(end.closed, bool)
    assert_type(end.peer_closed, bool)
    assert_type(end.outstanding, int)
    assert_type(end.spin_us, float)
    assert_type(end.counters(), dict[str, int])
    assert_type(end.fileno(), int)
    end.spin_us = 3
    end.watch()
    end.watch(4, pidfd=5)
    end.close()
    end.capacity = 8  # type: ignore[misc]
    end.closed = True  # type: ignore[misc]


def send(producer: RingProducer, array: npt.NDArray[np.float32]) -> None:
    reservation = producer.reserve(64, 1, flags=2, timeout_s=0)
    assert_type(reservation, Reservation)
    assert_type(reservation.sequence, int)
    assert_type(reservation.array(np.float32, (4, 4)), npt.NDArray[Any])
    assert_type(reservation.array("f4", (4,), offset=16), npt.NDArray[Any])
    assert_type(memoryview(reservation)[0], int)
    assert_type(len(reservation), int)
    with reservation as view:
        assert_type(view, memoryview)
    reservation.commit()
    reservation.abort()
    producer.write([b"bytes", bytearray(1), memoryview(b""), array], type=1, timeout_s=None)
    producer.write(["text"])  # type: ignore[list-item]
    producer.reserve("64")  # type: ignore[arg-type]
    producer.reserve(64, timeout_s="1")  # type: ignore[arg-type]
    producer.acquire()  # type: ignore[attr-defined]
    reservation.release()  # type: ignore[attr-defined]


def receive(consumer: RingConsumer, array: npt.NDArray[np.float32]) -> None:
    record = consumer.acquire()
    assert_type(record, Record)
    assert_type(consumer.acquire(0.5), Record)
    assert_type(record.type, int)
    assert_type(record.flags, int)
    assert_type(record.sequence, int)
    assert_type(record.array("u1", (64,)), npt.NDArray[Any])
    assert_type(bytes(record), bytes)
    assert_type(len(record), int)
    record.copy_to(bytearray(64))
    record.copy_to(array, 16)
    with record as same:
        assert_type(same, Record)
    record.release()
    record.commit()  # type: ignore[attr-defined]
    record.flags = 1  # type: ignore[misc]
    consumer.reserve(64)  # type: ignore[attr-defined]
    RingConsumer.attach(b"/ring")  # type: ignore[arg-type]


class Derived(Record):  # type: ignore[misc]
    """Records are final."""
