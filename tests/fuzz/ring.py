"""Target: either end of a ring whose other end, and whose memory, are the attacker's.

One execution attaches to a segment whose control page may be damaged, and then has the attacker
write words, headers and payloads while the victim acquires or reserves. Only what is documented is
raised, and whatever the victim hands out lies in the segment.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import struct
from typing import Any

import numpy as np

from moeshm import RingConsumer, RingProducer
from moeshm._ring import Record, Reservation
from moeshm.errors import (
    Corrupt,
    PeerDied,
    RingClosed,
    RingEmpty,
    RingError,
    RingFull,
    SegmentError,
)
from tests.fuzz.choices import Choices
from tests.ring import rings

CAPACITY = rings.PAGE
AREA = 2 * rings.PAGE
MOST_STEPS = 24
_HEADER = struct.Struct("<QIIQQ")
_WORD = struct.Struct("<Q")
_WIDTHS = {"length": 64, "type": 32, "flags": 32, "epoch": 64, "sequence": 64}
#: Words of the control page that mean something.
PLACES = (
    *(rings.PRODUCER_WORD, rings.CONSUMER_WORD, rings.PRODUCER_STATE, rings.CONSUMER_STATE),
    *(rings.CREATOR, rings.CREATOR + 8, rings.ATTACHER, rings.ATTACHER + 8),
    *(rings.MAGIC, rings.VERSION, rings.AREA, rings.EPOCH, rings.FIRST_POSITION),
)
#: What a producer writes until the ring is full.
_DRAINED = 1000
_DRAINED_BYTES = bytes(_DRAINED)
_ENDS: tuple[type[RingConsumer | RingProducer], ...] = (RingConsumer, RingProducer)


class _Kept:
    """A segment that executions use one after the other: to make one takes longer."""

    def __init__(self, creator: type[RingConsumer | RingProducer]) -> None:
        with creator.create(None, CAPACITY, spin_us=0, epoch=5) as ring:
            self.fd = os.dup(ring.fileno())
            self.memory = mmap.mmap(self.fd, 0)
            self._fresh = bytes(self.memory)

    def renew(self) -> None:
        """As it was made."""
        self.memory[:] = self._fresh

    def close(self) -> None:
        """Let go of it."""
        self.memory.close()
        os.close(self.fd)


@functools.cache
def _kept(number: int) -> _Kept:
    """Of the end of that number in `_ENDS`."""
    return _Kept(_ENDS[number])


def close() -> None:
    """Let go of what is kept between executions."""
    if _kept.cache_info().currsize:
        for number in range(len(_ENDS)):
            _kept(number).close()
        _kept.cache_clear()


def seeds() -> list[bytes]:
    """Each end, attached and created, with a good peer and a bad one."""
    good = [b"", bytes([0, 0, 1, 2, 1, 2, 1, 2, 3])]
    bad = [bytes([1, 0, 200, *range(1, 24)]), bytes([0, 4, 9, 0, 4, 7, 200, 1, 1])]
    # Of each size, a record that is sent and taken, and one of the largest before it is released.
    full = [bytes([0, 0, *[128, size, 0, 0, 1] * 2, 128, 6, 0, 0, 1, 2, 2]) for size in range(8)]
    # The same, a byte or a multiple longer than it is.
    long = [bytes([0, 0, 128, 2, 1, 0, how, 0, 1]) for how in (1, 129, 130)]
    more = (*good, *bad, *full, *long)
    return [bytes([kind, *each]) for kind in range(8) for each in more]


def test_one(data: bytes) -> str:
    """How the victim fared; AssertionError for what must not be."""
    choices = Choices(data)
    how = choices.byte()
    victim = _ENDS[how & 1]
    if how & 6 == 6:
        # It made the segment itself; the attacker attaches.
        with (
            victim.create(None, CAPACITY, spin_us=0, epoch=5) as ring,
            mmap.mmap(ring.fileno(), 0) as memory,
        ):
            memory[rings.ATTACHER : rings.ATTACHER + 8] = _WORD.pack(os.getpid())
            return _play(ring, memory, choices)
    kept = _kept(1 - (how & 1))
    kept.renew()
    for _ in range(choices.below(4)):
        _damage(kept.memory, choices)
    try:
        ring = victim.attach(kept.fd, spin_us=0, epoch=(None, 5)[choices.below(2)])
    except SegmentError as error:
        words = str(error).split()[:6]
        return f"refused: {' '.join(word for word in words if word.isalpha())}"
    with ring:
        assert ring.capacity == CAPACITY, "another size than the segment has"
        return _play(ring, kept.memory, choices)


def _damage(memory: mmap.mmap, choices: Choices) -> None:
    """Change a word that counts, or any."""
    number = choices.byte()
    at = PLACES[number] if number < len(PLACES) else number * 64 % len(memory)
    (old,) = _WORD.unpack_from(memory, at)
    memory[at : at + 8] = _WORD.pack(choices.near(old, 64))


def _play(ring: RingConsumer | RingProducer, memory: mmap.mmap, choices: Choices) -> str:
    begin = np.frombuffer(ring.memory(), np.uint8).__array_interface__["data"][0]
    attacker = _Attacker(memory, isinstance(ring, RingConsumer))
    player: _Reading | _Writing
    if isinstance(ring, RingConsumer):
        player = _Reading(ring, begin, attacker)
    else:
        player = _Writing(ring, begin)
    outcome = "nothing"
    try:
        for _ in range(MOST_STEPS):
            if not choices.are_left():
                break
            step = choices.byte()
            if step < 128:
                outcome = player.step(step, choices)
            else:
                attacker.step(step, choices)
        player.drain()
        outcome += ", drained"
    except (Corrupt, PeerDied, RingClosed, RingEmpty, RingFull) as error:
        outcome += f", {type(error).__name__}"
        if isinstance(error, Corrupt):
            _check_left_alone(ring, memory)
    finally:
        player.let_go()
    return outcome


def _check_left_alone(ring: RingConsumer | RingProducer, memory: mmap.mmap) -> None:
    """It stays corrupt, and the memory is never touched again."""
    before = memory[: rings.PAGE]
    for _ in range(2):
        try:
            ring.fileno()
            raise AssertionError("usable again")
        except Corrupt:
            pass
    ring.close()
    assert memory[: rings.PAGE] == before


class _Reading:
    """A consumer that takes what comes."""

    def __init__(self, ring: RingConsumer, begin: int, attacker: _Attacker) -> None:
        self._ring = ring
        self._begin = begin
        self._attacker = attacker
        self._held: list[Record] = []
        #: Bytes of the ring, at least: those that were taken back are passed over.
        self._taken = 0

    def step(self, step: int, choices: Choices) -> str:
        """One thing that it may do."""
        if step % 4 < 2:
            try:
                self._take()
            except RingError as error:
                if type(error) not in (RingError, RingEmpty):
                    raise
                return type(error).__name__
            return f"{len(self._held)} held"
        if self._held:
            self._held.pop(0 if step % 4 == 2 else choices.below(len(self._held))).release()
        return "released"

    def _take(self) -> None:
        record = self._ring.acquire(0)
        self._held.append(record)
        assert len(record) <= CAPACITY
        self._taken += rings.record_bytes(len(record))
        assert self._taken <= self._attacker.published, "more than was published"
        held = sum(rings.record_bytes(len(each)) for each in self._held)
        assert held <= AREA, "some of it was overwritten"
        with memoryview(record) as view:
            at = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
            assert self._begin <= at <= at + len(record) <= self._begin + 2 * AREA
            copy = bytearray(len(record))
            record.copy_to(copy)
            assert copy == bytes(view)
        n_words = len(record) // 4
        words: Any = record.array("u4", (n_words,))
        assert len(words) == n_words
        with contextlib.suppress(ValueError):
            record.array("u4", (n_words + 1,))
            raise AssertionError("an array beyond the record")

    def drain(self) -> None:
        """Take and release for as long as something comes."""
        for _ in range(2 * AREA // 64):
            while self._held:
                self._held.pop().release()
            self._take()
        raise AssertionError("more records than the segment has room for")

    def let_go(self) -> None:
        """Of every record."""
        while self._held:
            self._held.pop().release()


class _Writing:
    """A producer that sends what it can."""

    def __init__(self, ring: RingProducer, begin: int) -> None:
        self._ring = ring
        self._begin = begin
        self._held: list[Reservation] = []

    def step(self, step: int, choices: Choices) -> str:
        """One thing that it may do."""
        size = (0, 1, 64, 65, 100, 4000, CAPACITY, CAPACITY + 1)[choices.below(8)]
        try:
            if step % 4 == 0:
                self._ring.write([bytes(size)], step, timeout_s=0)
            elif step % 4 == 1:
                self._reserve(size)
            elif self._held:
                held = self._held.pop(choices.below(len(self._held)))
                (held.commit if step % 4 == 2 else held.abort)()
        except RingError as error:
            if type(error) not in (RingError, RingFull):
                raise
            return type(error).__name__
        return f"{len(self._held)} held"

    def _reserve(self, size: int) -> None:
        reservation = self._ring.reserve(size, timeout_s=0)
        self._held.append(reservation)
        with memoryview(reservation) as view:
            assert len(view) == size
            at = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
            assert self._begin <= at <= at + size <= self._begin + 2 * AREA
            view[:] = b"x" * size

    def drain(self) -> None:
        """Commit all, and write until it is full."""
        while self._held:
            self._held.pop(0).commit()
        for _ in range(AREA // _DRAINED + 1):
            self._ring.write([_DRAINED_BYTES], timeout_s=0)

    def let_go(self) -> None:
        """Of every reservation."""
        while self._held:
            self._held.pop().abort()


class _Attacker:
    """The other end: it behaves, more or less."""

    def __init__(self, memory: mmap.mmap, writes: bool) -> None:
        self._memory = memory
        self._writes = writes
        (self._first,) = _WORD.unpack_from(memory, rings.FIRST_POSITION)
        self._position = self._first
        #: By its word, at most, so far.
        self.published = 0
        self._offset = self._sequence = 0
        self._word, self._state = (
            (rings.PRODUCER_WORD, rings.PRODUCER_STATE)
            if writes
            else (rings.CONSUMER_WORD, rings.CONSUMER_STATE)
        )
        self._look()

    def step(self, step: int, choices: Choices) -> None:
        """One thing that it may do."""
        kind = step % 8
        if kind < 4:
            self._go_on(step, choices)
        elif kind == 4:
            _damage(self._memory, choices)
        elif kind == 5:
            self._set(self._word, choices.near(self._position << 1, 64))
        elif kind == 6:
            # A header, or payload, that changes after it was published.
            at = rings.PAGE + 8 * choices.below(AREA // 8)
            self._set(at, choices.number(64))
        else:
            self._set(self._state, choices.near(1, 8))
        self._look()

    def _look(self) -> None:
        (word,) = _WORD.unpack_from(self._memory, self._word)
        position = word >> 1 & ~63
        self.published = max(self.published, (position - self._first) % rings.POSITIONS)

    def _go_on(self, step: int, choices: Choices) -> None:
        if not self._writes:
            # It has read up to where the victim is, or to some place before.
            (word,) = _WORD.unpack_from(self._memory, rings.PRODUCER_WORD)
            self._position = (word >> 1 & ~63) - (64 * choices.below(4) if step % 8 else 0)
            self._set(self._word, self._position << 1)
            return
        length = (0, 1, 64, 65, 100, 1000, CAPACITY, 8)[choices.below(8)]
        fields = {"length": length, "type": 1, "flags": 0, "epoch": 5, "sequence": self._sequence}
        choices.change(fields, _WIDTHS)
        at = rings.PAGE + self._offset
        header = _HEADER.pack(*fields.values())
        self._memory[at : at + len(header)] = header
        self._position += rings.record_bytes(length)
        self._offset = (self._offset + rings.record_bytes(length)) % AREA
        self._sequence += 1
        if step % 8 != 3:
            armed = choices.below(2)
            self._set(self._word, self._position << 1 | armed)

    def _set(self, at: int, value: int) -> None:
        self._memory[at : at + 8] = _WORD.pack(value & ((1 << 64) - 1))
