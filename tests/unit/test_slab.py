"""Slabs: the segment, and the words in shared memory."""

from __future__ import annotations

import ctypes
import os
import threading

import pytest

from moeshm import segment
from moeshm._words import load_word, store_word, wait_for_word
from moeshm.errors import SegmentError
from moeshm.transport.slab import FLAGS_BYTES, Segment

DATA_BYTES = 64 << 10
#: Of prctl(2).
_SET_TIMER_SLACK, _GET_TIMER_SLACK = 29, 30


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
