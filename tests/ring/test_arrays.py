"""Arrays and copies of a record: its own memory, within its bounds, read-only where it is read."""

from __future__ import annotations

import fcntl
import os
import sys
import warnings

import numpy as np
import pytest

from moeshm import RingConsumer, RingProducer, segment
from moeshm._ring import Record
from tests.ring import rings
from tests.ring.rings import RawSegment

Ring = tuple[RingProducer, RingConsumer]


def send(ring: Ring, payload: bytes) -> Record:
    """Through the ring."""
    producer, consumer = ring
    producer.write([payload])
    return consumer.acquire(0)


def test_an_array_is_the_records_memory(ring: Ring) -> None:
    producer, consumer = ring
    reservation = producer.reserve(4 + 24)
    memoryview(reservation)[:4] = b"head"
    array = reservation.array(np.float32, (2, 3), offset=4)
    array[...] = np.arange(6).reshape(2, 3)
    assert array.flags.c_contiguous
    assert array.flags.aligned
    assert not array.flags.owndata
    del array
    reservation.commit()
    record = consumer.acquire(0)
    read = record.array("f4", [2, 3], offset=4)  # type: ignore[arg-type]
    np.testing.assert_array_equal(read, np.arange(6).reshape(2, 3))
    with RawSegment(producer.fileno()) as raw:
        raw[rings.PAGE + rings.HEADER + 4] = 0
    assert read[0, 1] == 0


def test_a_record_is_read_only(ring: Ring) -> None:
    record = send(ring, bytes(16))
    array = record.array("u1", (16,))
    assert memoryview(record).readonly
    for write in (
        lambda: array.__setitem__(0, 1),
        lambda: setattr(array.flags, "writeable", True),
        lambda: memoryview(record).__setitem__(0, 1),
    ):
        assert rings.raised_by(write) in (ValueError, TypeError)


@pytest.mark.parametrize(
    ("dtype", "shape", "offset"),
    [
        ("f4", (17,), 0),
        ("f4", (16,), 4),
        ("f4", (4, 5), 0),
        ("u1", (65,), 0),
        ("u1", (-1,), 0),
        ("u1", (1,), 64),
        ("u1", (0,), 65),
        ("u1", (1,), (1 << 64) - 1),
        ("f4", (1,), 2),
        ("f8", (1,), 4),
        ("O", (1,), 0),
        ("S0", (1,), 0),
        ([("x", "O")], (1,), 0),
        ("u1", (2,) * 9, 0),
        ("u1", (1 << 62, 4), 0),
        ("u1", (1 << 32, 1 << 32), 0),
    ],
)
def test_arrays_that_do_not_fit(
    ring: Ring, dtype: str, shape: tuple[int, ...], offset: int
) -> None:
    record = send(ring, bytes(64))
    with pytest.raises(ValueError, match=r"exceed|cannot lie|needs a multiple"):
        record.array(dtype, shape, offset)
    record.release()


def test_a_size_that_overflows_does_not_fit() -> None:
    """Each dimension fits a record of 4 GiB, and their product is 0 modulo 2^64."""
    capacity = 4 << 30
    fd = os.memfd_create("moeshm-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, capacity + 2 * rings.PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, segment.SIZE_SEALS)
    with RingConsumer.create(None, 4096) as model, RawSegment(model.fileno()) as page:
        control = page.control_page()
    os.pwrite(fd, control[:128], 0)
    os.pwrite(fd, (capacity + rings.PAGE).to_bytes(8, "little"), rings.AREA)
    with RingProducer.attach(fd) as producer:
        reservation = producer.reserve(capacity)
        with pytest.raises(ValueError, match="exceeds"):
            reservation.array("u1", (1 << 32, 1 << 32))
        reservation.abort()
    os.close(fd)


@pytest.mark.parametrize("shape", [(0,), (0, 2048), (2048, 0), (0, 1 << 40)])
def test_empty_arrays_fit_anywhere(ring: Ring, shape: tuple[int, ...]) -> None:
    record = send(ring, bytes(64))
    assert record.array("f4", shape, offset=64).shape == shape


def test_a_failed_array_is_no_view_and_keeps_no_dtype(ring: Ring) -> None:
    record = send(ring, bytes(64))
    dtype = np.dtype([("some", "u4"), ("fields", "f4")])
    before = sys.getrefcount(dtype)
    for _ in range(100):
        with pytest.raises(ValueError, match="exceeds"):
            record.array(dtype, (9,))
        with pytest.raises(ValueError, match="too big"):
            record.array(dtype, (0, 1 << 62))
        record.array(dtype, (8,))
    assert sys.getrefcount(dtype) == before
    record.release()


def test_copy_to_fills_a_buffer(ring: Ring) -> None:
    record = send(ring, bytes(range(64)))
    part = np.zeros(4, np.uint16)
    record.copy_to(part, 8)
    assert part.tobytes() == bytes(range(8, 16))
    record.copy_to(bytearray(0), 64)
    for size, offset in ((65, 0), (1, 64), (0, 65), (8, (1 << 64) - 4)):
        with pytest.raises(ValueError, match="the record has 64"):
            record.copy_to(bytearray(size), offset)
    with pytest.raises(BufferError):
        record.copy_to(bytes(8))
    record.release()


def test_large_copies_are_whole() -> None:
    payload = os.urandom(1 << 20)
    with rings.pair(1 << 20) as ring:
        record = send(ring, payload)
        copy = bytearray(len(payload))
        record.copy_to(copy)
        assert copy == payload
        record.release()


def test_a_tensor_without_a_copy(ring: Ring) -> None:
    torch = pytest.importorskip("torch")
    producer, consumer = ring
    reservation = producer.reserve(24)
    tensor = torch.from_numpy(reservation.array("f4", (2, 3)))
    tensor.copy_(torch.arange(6.0).reshape(2, 3))
    with pytest.raises(BufferError):
        reservation.commit()
    del tensor
    reservation.commit()
    record = consumer.acquire(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        received = torch.from_numpy(record.array("f4", (2, 3)))
    assert received.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert received.data_ptr() == record.array("u1", (24,)).ctypes.data
    del received
    record.release()
