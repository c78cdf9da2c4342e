"""A peer that writes nonsense: typed errors, never a crash, and nothing outside is read.

Under the address sanitizer the same tests see reads that happen not to crash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from moeshm import RingConsumer, RingProducer
from moeshm.errors import Corrupt, PeerDied, RingEmpty
from tests.ring import hostility, rings
from tests.ring.children import child
from tests.ring.rings import RawSegment

Damage = Callable[[RawSegment], None]


def set_word(offset: int, word: int) -> Damage:
    def damage(segment: RawSegment) -> None:
        segment[offset] = word

    return damage


def flip(offset: int, bit: int) -> Damage:
    return lambda segment: segment.flip(offset, bit)


AREA = 2 * rings.PAGE
FIRST_HEADER = rings.PAGE
UNUSED_BITS = range(2, 7)


@pytest.fixture
def segment(ring: tuple[RingProducer, RingConsumer]) -> Iterator[RawSegment]:
    """The segment of the ring."""
    producer, _ = ring
    with RawSegment(producer.fileno()) as raw:
        yield raw


# --- the consumer -----------------------------------------------------------------------

WORDS_OF_PRODUCER = {
    "back": -64 << 1,
    "far back": 1 << 63,
    "one record beyond the area": AREA + 64 << 1,
    **{f"unused bit {bit}": 64 << 1 | 1 << bit for bit in UNUSED_BITS},
}


@pytest.mark.parametrize("word", WORDS_OF_PRODUCER.values(), ids=WORDS_OF_PRODUCER)
def test_an_impossible_word_of_the_producer(
    ring: tuple[RingProducer, RingConsumer], segment: RawSegment, word: int
) -> None:
    _, consumer = ring
    segment[rings.PRODUCER_WORD] = word
    with pytest.raises(Corrupt, match="position word"):
        consumer.acquire(0)


def test_a_producer_that_goes_back_later(
    ring: tuple[RingProducer, RingConsumer], segment: RawSegment
) -> None:
    producer, consumer = ring
    for _ in range(3):
        producer.write([b"good"])
        consumer.acquire(0).release()
    segment[rings.PRODUCER_WORD] = 2 * 64 << 1
    with pytest.raises(Corrupt, match="0x100, but 192 was freed"):
        consumer.acquire(0)


DAMAGED_HEADERS = {
    "longer than what was published": set_word(FIRST_HEADER + rings.LENGTH, 65),
    "longer than the capacity": set_word(FIRST_HEADER + rings.LENGTH, rings.PAGE + 1),
    "of a length that overflows": set_word(FIRST_HEADER + rings.LENGTH, (1 << 64) - 1),
    "of another epoch": flip(FIRST_HEADER + rings.RECORD_EPOCH, 63),
    "of another sequence": flip(FIRST_HEADER + rings.SEQUENCE, 0),
}


@pytest.mark.parametrize("damage", DAMAGED_HEADERS.values(), ids=DAMAGED_HEADERS)
def test_an_impossible_header(
    ring: tuple[RingProducer, RingConsumer], segment: RawSegment, damage: Damage
) -> None:
    producer, consumer = ring
    producer.write([b"good"])
    damage(segment)
    with pytest.raises(Corrupt, match="record"):
        consumer.acquire(0)


def test_a_header_is_not_read_again(
    ring: tuple[RingProducer, RingConsumer], segment: RawSegment
) -> None:
    producer, consumer = ring
    producer.write([b"good"])
    record = consumer.acquire(0)
    segment[FIRST_HEADER + rings.LENGTH] = 1 << 40
    assert bytes(record) == b"good"
    assert len(record) == 4
    record.release()
    producer.write([b"next"])
    with consumer.acquire(0) as following:
        assert bytes(following) == b"next"


def test_words_that_change_without_a_record_do_not_hold_up_a_timeout() -> None:
    with RingConsumer.create(None, rings.PAGE) as consumer:
        fd = consumer.fileno()
        with child("change_without_a_record", fd, fds=[fd]) as producer:
            assert producer.line() == "ready"
            with pytest.raises(RingEmpty):
                consumer.acquire(timeout_s=0.05)
            producer.go_on()
            producer.finish()


# --- the producer -----------------------------------------------------------------------

WORDS_OF_CONSUMER = {
    "back": -64 << 1,
    "ahead of what was published": 64 + AREA << 1,
    "REBASED, which is the producer's": 2,
    **{f"unused bit {bit}": 1 << bit for bit in UNUSED_BITS},
}


@pytest.mark.parametrize("word", WORDS_OF_CONSUMER.values(), ids=WORDS_OF_CONSUMER)
def test_an_impossible_word_of_the_consumer(
    ring: tuple[RingProducer, RingConsumer], segment: RawSegment, word: int
) -> None:
    producer, _ = ring
    producer.reserve(rings.PAGE).commit()
    segment[rings.CONSUMER_WORD] = word
    with pytest.raises(Corrupt, match="position word"):
        producer.reserve(rings.PAGE, timeout_s=0)


# --- afterwards -------------------------------------------------------------------------


def test_a_corrupt_ring_stays_so_and_is_never_touched_again(
    ring: tuple[RingProducer, RingConsumer], segment: RawSegment
) -> None:
    producer, consumer = ring
    producer.write([b"one"])
    producer.write([b"two"])
    record = consumer.acquire(0)
    segment.flip(FIRST_HEADER + 64 + rings.SEQUENCE, 5)
    with pytest.raises(Corrupt):
        consumer.acquire(0)
    before = segment.control_page()
    for call in (lambda: consumer.acquire(0), consumer.fileno, lambda: consumer.peer_closed):
        with pytest.raises(Corrupt, match="record 33 of epoch 0, expected 1 of 0; close the ring"):
            call()
    assert bytes(record) == b"one"
    record.release()
    consumer.close()
    assert segment.control_page() == before


def test_a_corrupt_producer_lets_go_without_a_touch(
    ring: tuple[RingProducer, RingConsumer], segment: RawSegment
) -> None:
    producer, _ = ring
    older, newer = producer.reserve(8), producer.reserve(rings.PAGE)
    segment[rings.CONSUMER_WORD] = 4
    with pytest.raises(Corrupt):
        producer.reserve(rings.PAGE, timeout_s=0)
    before = bytes(segment.control_page()), segment[FIRST_HEADER + 8]
    with pytest.raises(Corrupt):
        newer.commit()
    older.abort()
    del older, newer
    producer.close()
    assert (segment.control_page(), segment[FIRST_HEADER + 8]) == before


@pytest.mark.parametrize("pid", [(1 << 64) - 1, 1 << 31, (1 << 31) - 1])
def test_a_peer_with_an_impossible_pid_is_dead(
    ring: tuple[RingProducer, RingConsumer], segment: RawSegment, pid: int
) -> None:
    _, consumer = ring
    segment[rings.CREATOR] = pid
    with pytest.raises(PeerDied):
        consumer.acquire(0)


# --- at random --------------------------------------------------------------------------


def test_bits_that_flip_under_both_ends(seed: int) -> None:
    with child("damage_while_running", seed, 60) as flipping:
        assert "Corrupt" in flipping.finish()


def test_bits_that_flipped_before_attaching(seed: int) -> None:
    with child("attach_to_damaged", seed, 400) as attaching:
        assert "SegmentError" in attaching.finish()


@pytest.mark.parametrize("crash", hostility.CRASHES)
def test_it_never_reads_memory_that_is_gone(crash: str) -> None:
    with child("survive", crash) as surviving:
        assert surviving.finish() == "alive\n"
