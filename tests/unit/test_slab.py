"""Slabs: which call has which part of it, the segment, and the words in shared memory."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeshm import segment
from moeshm._words import load_word, store_word, wait_for_word
from moeshm.errors import SegmentError
from moeshm.transport.slab import ALIGNMENT, FLAGS_BYTES, SLOTS, Allocator, Claim, Segment

DATA_BYTES = 64 << 10
#: Of prctl(2).
_SET_TIMER_SLACK, _GET_TIMER_SLACK = 29, 30
SIZES = st.tuples(*[st.integers(0, DATA_BYTES // 5)] * 4)


def parts(claim: Claim, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where its arrays begin and end."""
    return [(at, at + size) for at, size in zip(claim.places[1:], sizes, strict=True)]


@given(st.lists(st.one_of(SIZES, st.just("free")), max_size=200))
def test_claims_never_overlap(steps: list[tuple[int, int, int, int] | str]) -> None:
    allocator = Allocator(DATA_BYTES)
    live: list[tuple[Claim, tuple[int, ...]]] = []
    last = 0
    for step in steps:
        if isinstance(step, str):
            if live:
                allocator.free_oldest()
                live.pop(0)
            continue
        claim = allocator.claim(step)
        if claim is None:
            assert live, "an empty slab has room for what is no larger than it"
            continue
        assert claim.sequence == last + 1
        last = claim.sequence
        live.append((claim, step))
        assert len({each.places.slot for each, _ in live}) == len(live) <= SLOTS
        regions = sorted(region for each, sizes in live for region in parts(each, sizes))
        assert regions[-1][1] <= DATA_BYTES
        assert all(begin % ALIGNMENT == 0 for begin, _ in regions)
        used = [region for region in regions if region[0] < region[1]]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(used))


def test_there_are_as_many_claims_as_slots() -> None:
    allocator = Allocator(DATA_BYTES)
    claims = [allocator.claim((16, 0, 0, 16)) for _ in range(SLOTS)]
    assert None not in claims
    assert allocator.claim((16, 0, 0, 16)) is None
    allocator.free_oldest()
    again = allocator.claim((16, 0, 0, 16))
    assert again is not None
    assert claims[0] is not None
    assert again.places.slot == claims[0].places.slot


def test_an_empty_slab_begins_anew() -> None:
    """What was used last is in caches."""
    allocator = Allocator(DATA_BYTES)
    for _ in range(100):
        claim = allocator.claim((4096, 64, 64, 4096))
        assert claim is not None
        assert claim.places.hidden_states == 0
        allocator.free_oldest()


def test_a_segment_is_shared() -> None:
    mine, fd = Segment.create(DATA_BYTES)
    theirs = Segment.attach(fd, DATA_BYTES)
    os.close(fd)
    assert len(mine.data) == DATA_BYTES
    mine.data[7] = 99
    assert theirs.data[7] == 99
    store_word(mine.memory, 128, 5)
    assert load_word(theirs.memory, 128) == 5
    kept = theirs.memory
    theirs.close()
    mine.close()
    # As long as somebody uses it.
    assert kept[FLAGS_BYTES + 7] == 99


def test_a_segment_of_another_size_is_refused() -> None:
    fd = segment.create_anonymous(FLAGS_BYTES)
    with pytest.raises(SegmentError, match=f"{FLAGS_BYTES} bytes; {FLAGS_BYTES + 4096} were"):
        Segment.attach(fd, 4096)
    os.close(fd)
    unsealed = os.memfd_create("x", os.MFD_CLOEXEC)
    with pytest.raises(SegmentError, match="seal"):
        Segment.attach(unsealed, 0)
    os.close(unsealed)


@pytest.mark.parametrize(
    ("now", "wanted", "is_there"),
    [
        (5, 5, True),
        (6, 5, True),
        (4, 5, False),
        (0, 0xFFFFFFFF, True),
        (0xFFFFFFFF, 0, False),
        (0x80000004, 5, True),
        (0x80000006, 5, False),
    ],
)
def test_words_are_compared_on_a_circle(now: int, wanted: int, is_there: bool) -> None:
    memory = bytearray(64)
    store_word(memory, 4, now)
    assert wait_for_word(memory, 4, wanted, 0, 0) == is_there


@pytest.mark.parametrize("spin_ns", [0, 10**10])
def test_a_word_is_waited_for(spin_ns: int) -> None:
    """While it sleeps and while it spins, without the interpreter's lock."""
    memory, begun = bytearray(64), threading.Event()

    def set_it() -> None:
        assert begun.wait(20)
        store_word(memory, 0, 3)

    setter = threading.Thread(target=set_it)
    setter.start()
    begun.set()
    assert wait_for_word(memory, 0, 3, 20 * 10**9, spin_ns)
    setter.join()
    assert not wait_for_word(memory, 0, 4, 10**6, spin_ns)


def test_a_wait_leaves_the_threads_timers_as_they_are() -> None:
    prctl = ctypes.CDLL(None).prctl
    before = prctl(_GET_TIMER_SLACK)
    assert prctl(_SET_TIMER_SLACK, 123_456) == 0
    try:
        assert not wait_for_word(bytearray(64), 0, 1, 10**6, 0)
        assert prctl(_GET_TIMER_SLACK) == 123_456
    finally:
        prctl(_SET_TIMER_SLACK, before)


@pytest.mark.parametrize("offset", [-4, 1, 62, 64])
def test_what_is_no_word(offset: int) -> None:
    for use in (
        lambda memory: load_word(memory, offset),
        lambda memory: store_word(memory, offset, 1),
        lambda memory: wait_for_word(memory, offset, 1, 0, 0),
    ):
        with pytest.raises(IndexError, match=f"offset {offset} in 64 bytes"):
            use(bytearray(64))
    with pytest.raises(BufferError):
        store_word(bytes(64), 0, 1)
