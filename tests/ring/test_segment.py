"""Memory for rings: committed when it is made, sealed, checked before it is used, given back."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeshm import RingConsumer, RingProducer, segment
from moeshm._ring import MAX_CAPACITY
from moeshm.errors import RingClosed, RingError, SegmentError
from tests.ring import rings
from tests.ring.children import child
from tests.ring.rings import RawSegment


def memfd(size: int, *, seals: int = segment.SIZE_SEALS) -> int:
    """Shared memory that nobody committed."""
    fd = os.memfd_create("moeshm-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


# --- sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "given"),
    [(1, 4096), (4095, 4096), (4096, 4096), (4097, 8192), (100_000, 131072), (1 << 20, 1 << 20)],
)
def test_a_capacity_is_rounded_up_to_a_power_of_two_of_pages(asked: int, given: int) -> None:
    with RingProducer.create(None, asked) as producer:
        assert producer.capacity == given
        with RingConsumer.attach(producer.fileno()) as consumer:
            assert consumer.capacity == given
            assert producer.name is consumer.name is None


@pytest.mark.parametrize("capacity", [0, -1, MAX_CAPACITY + 1])
def test_a_capacity_out_of_range(capacity: int) -> None:
    with pytest.raises(RingError, match=f"capacity={capacity}; it must lie in 1..549755813888"):
        RingProducer.create(None, capacity)


@pytest.mark.parametrize("position", [1, 63, rings.POSITIONS])
def test_a_first_position_out_of_range(position: int) -> None:
    with pytest.raises(RingError, match="multiple of 64 below 2"):
        RingProducer.create(None, 4096, first_position=position)


def test_the_data_area_is_mapped_twice_in_a_row() -> None:
    """Read-only for a consumer, and for as long as it is viewed."""
    with (
        RingProducer.create(None, 4096) as producer,
        RingConsumer.attach(producer.fileno()) as consumer,
    ):
        written, read = producer.memory(), consumer.memory()
    assert (written.nbytes, written.readonly) == (read.nbytes, not read.readonly)
    assert (written.nbytes, written.readonly) == (4 * rings.PAGE, False)
    written[7], written[2 * rings.PAGE + 9] = 1, 2
    for view in (written, read):
        assert (view[7], view[9]) == (1, 2)
        assert view[: 2 * rings.PAGE] == view[2 * rings.PAGE :]
    with pytest.raises(TypeError, match="read-only"):
        read[0] = 1


def test_a_closed_end_has_no_memory() -> None:
    producer = RingProducer.create(None, 4096)
    producer.close()
    with pytest.raises(RingClosed, match="this end of the ring is closed"):
        producer.memory()


def test_memory_is_committed_when_it_is_made() -> None:
    with RingProducer.create(None, 1 << 20) as producer:
        found = os.fstat(producer.fileno())
        assert found.st_size == (1 << 20) + 2 * rings.PAGE
        assert found.st_blocks * 512 >= found.st_size


def test_a_limit_of_the_file_size_is_an_error_with_sizes() -> None:
    with child("create_beyond_file_size") as creator:
        said = creator.finish()
    assert f"[Errno {errno.EFBIG}]" in said
    assert "anonymous shared memory of 8396800 bytes cannot be had" in said
    assert "ask for a smaller capacity" in said


def test_a_small_dev_shm_is_an_error_with_sizes_and_no_signal(name: str) -> None:
    namespace = ("unshare", "--mount", "sh", "-c")
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    tried = subprocess.run([*namespace, mount], check=False, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no /dev/shm of its own, which takes root: {tried.stderr.strip()}")
    prefix = [*namespace, f'{mount} && exec "$0" "$@"']
    with child("create_in_small_shm", name, prefix=prefix) as creator:
        said = creator.finish()
    assert f"segment {name!r} of 8396800 bytes cannot be had (No space left on device)" in said
    assert "free on /dev/shm: 1048576 bytes" in said
    assert "--shm-size" in said


# --- the fd -----------------------------------------------------------------------------


def test_every_fd_is_closed_on_exec(name: str) -> None:
    with (
        rings.pair() as ends,
        RingProducer.create(name, 4096) as named,
        RingConsumer.attach(name) as attached,
    ):
        for end in (*ends, named, attached):
            assert not os.get_inheritable(end.fileno())


def test_an_anonymous_segment_cannot_change_its_size() -> None:
    with RingProducer.create(None, 4096) as producer:
        assert fcntl.fcntl(producer.fileno(), fcntl.F_GET_SEALS) == segment.SIZE_SEALS
        for size in (4096, 1 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(producer.fileno(), size)


def test_the_fd_that_was_attached_stays_the_callers() -> None:
    with RingProducer.create(None, 4096) as producer:
        received = os.dup(producer.fileno())
        RingConsumer.attach(received).close()
        os.fstat(received)
        os.close(received)


def test_closing_twice_closes_no_other_fd() -> None:
    producer = RingProducer.create(None, 4096)
    fd = producer.fileno()
    producer.close()
    reader, writer = os.pipe()
    assert fd in (reader, writer), "the number was not used again"
    producer.close()
    del producer
    os.fstat(fd)
    os.close(reader)
    os.close(writer)


# --- refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL])
def test_a_memfd_without_a_seal(missing: int) -> None:
    fd = memfd(3 * rings.PAGE, seals=segment.SIZE_SEALS & ~missing)
    with pytest.raises(SegmentError, match="SHRINK, GROW and SEAL are required"):
        RingConsumer.attach(fd)
    os.close(fd)


def test_a_memfd_sealed_against_writing() -> None:
    fd = memfd(3 * rings.PAGE, seals=segment.SIZE_SEALS | fcntl.F_SEAL_WRITE)
    with pytest.raises(SegmentError, match="Operation not permitted"):
        RingConsumer.attach(fd)
    os.close(fd)


def test_fds_that_are_no_shared_memory(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 3 * rings.PAGE)
    for fd, why in ((reader, "no shared memory"), (file, "no memfd"), (-1, "not open")):
        with pytest.raises(SegmentError, match=why):
            RingConsumer.attach(fd)
    for fd in (reader, writer, file):
        os.close(fd)


@pytest.mark.parametrize("size", [0, rings.PAGE, 2 * rings.PAGE, 3 * rings.PAGE + 64, 1 << 41])
def test_a_memfd_of_a_size_that_no_ring_has(size: int) -> None:
    fd = memfd(size)
    with pytest.raises(SegmentError, match=f"{size} bytes; no ring has that size"):
        RingConsumer.attach(fd)
    os.close(fd)


DAMAGES = {
    "magic": (rings.MAGIC, 0x6D6873656F6D, "no ring"),
    "version": (rings.VERSION, 2 | 1 << 32, "has version 2, this moeshm 1"),
    "area": (rings.AREA, 3 * rings.PAGE, "says 12288 bytes, its segment has 8192"),
    "role": (rings.VERSION, 1 | 3 << 32, "attach the other one"),
    "unaligned position": (rings.FIRST_POSITION, 32, "positions start at 32"),
    "high position": (rings.FIRST_POSITION, 1 << 63, "positions start at"),
    "attacher": (rings.ATTACHER, 1, "process 1 is attached to this ring already"),
}


@pytest.mark.parametrize(("offset", "word", "why"), DAMAGES.values(), ids=DAMAGES)
def test_a_control_page_that_is_wrong(offset: int, word: int, why: str) -> None:
    with RingProducer.create(None, 4096) as producer:
        with RawSegment(producer.fileno()) as raw:
            raw[offset] = word
        with pytest.raises(SegmentError, match=why):
            RingConsumer.attach(producer.fileno())


def test_a_capacity_that_is_no_power_of_two() -> None:
    with RingProducer.create(None, 4096) as producer, RawSegment(producer.fileno()) as raw:
        fd = memfd(5 * rings.PAGE)
        with RawSegment(fd) as other:
            for offset in range(0, 256, 8):
                other[offset] = raw[offset]
            other[rings.AREA] = 4 * rings.PAGE
        with pytest.raises(SegmentError, match="16384"):
            RingConsumer.attach(fd)
        os.close(fd)


def test_a_ring_has_one_attacher() -> None:
    with (
        rings.pair() as (producer, _),
        pytest.raises(SegmentError, match=f"process {os.getpid()} is attached") as info,
    ):
        RingConsumer.attach(producer.fileno())
    assert info.value.errno == errno.EBUSY


def test_ends_come_from_create_and_attach_only() -> None:
    for end in (RingProducer, RingConsumer):
        with pytest.raises(TypeError, match=r"use \w+.create or .attach"):
            end()


# --- given back -------------------------------------------------------------------------


@pytest.fixture
def mappings() -> Iterator[int]:
    """How many mappings of anonymous shared memory there are; as many must be there afterwards."""
    before = count_mappings()
    yield before
    assert count_mappings() == before


def count_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:moeshm")


def test_memory_goes_when_the_last_view_is_gone(mappings: int) -> None:
    with rings.pair() as (producer, consumer):
        producer.write([b"kept for long"])
        array = consumer.acquire(0).array("u1", (13,))
    # One end's control page and data area, twice; the kernel may join neighbours.
    assert 2 <= count_mappings() - mappings <= 3
    assert bytes(array) == b"kept for long"
    del array
    assert count_mappings() == mappings


def test_a_ring_that_is_forgotten_closes(mappings: int) -> None:
    with RingProducer.create(None, 4096) as producer:
        consumer = RingConsumer.attach(producer.fileno())
        assert count_mappings() > mappings
        del consumer
        assert producer.peer_closed


def test_a_failed_attach_keeps_nothing(mappings: int) -> None:
    fd = memfd(3 * rings.PAGE)
    with pytest.raises(SegmentError):
        RingConsumer.attach(fd)
    os.close(fd)
    assert count_mappings() == mappings
