"""Damage to a ring while it is used, at random; and what once read memory that was gone."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from moeshm import RingConsumer, RingProducer, process
from moeshm.errors import (
    Corrupt,
    PeerDied,
    RingClosed,
    RingEmpty,
    RingFull,
    SegmentError,
)
from tests.ring import rings

#: What the ends of a damaged ring may raise. (PeerDied: the peer's pid is in the segment.)
ALLOWED = (Corrupt, PeerDied, RingClosed, RingEmpty, RingFull)
CAPACITY = 4096
MOST_RECORDS = 2000


# --- at random --------------------------------------------------------------------------


def damage_while_running(seed: int, rounds: int) -> Counter[str]:
    """Flip bits while both ends run; the names of what they raised.

    Anything but `ALLOWED` escapes.
    """
    chance = random.Random(seed)
    raised: Counter[str] = Counter()
    for _ in range(rounds):
        with rings.pair(CAPACITY) as (producer, consumer):
            ends = [
                rings.Background(functools.partial(_write, producer, chance.random())),
                rings.Background(functools.partial(_read, consumer)),
            ]
            with rings.RawSegment(producer.fileno()) as segment:
                while any(end.is_running() for end in ends):
                    _flip_one(segment, chance)
            raised.update(end.result() for end in ends)
    return raised


def _flip_one(segment: rings.RawSegment, chance: random.Random) -> None:
    words = (
        rings.PRODUCER_WORD,
        rings.CONSUMER_WORD,
        rings.PRODUCER_STATE,
        rings.CONSUMER_STATE,
        8 * chance.randrange(rings.PAGE // 8),
        rings.PAGE + 64 * chance.randrange(CAPACITY // 64) + 8 * chance.randrange(4),
        rings.PAGE + 64 * chance.randrange(CAPACITY // 64) + 8 * chance.randrange(4),
    )
    segment.flip(chance.choice(words), chance.randrange(64))


def _write(producer: RingProducer, seed: float) -> str:
    chance = random.Random(seed)
    try:
        for _ in range(MOST_RECORDS):
            size = chance.choice([0, 8, 100, CAPACITY])
            reservation = producer.reserve(size, timeout_s=0.02)
            with reservation as view:
                view[:] = bytes(size)
    except ALLOWED as error:
        return type(error).__name__
    return "nothing"


def _read(consumer: RingConsumer) -> str:
    try:
        for _ in range(MOST_RECORDS):
            with consumer.acquire(timeout_s=0.02) as record:
                bytes(record)
    except ALLOWED as error:
        return type(error).__name__
    return "nothing"


def attach_to_damaged(seed: int, rounds: int) -> Counter[str]:
    """Attach to rings whose control page has flipped bits, and use what can be attached."""
    chance = random.Random(seed)
    raised: Counter[str] = Counter()
    for _ in range(rounds):
        with RingProducer.create(None, CAPACITY) as producer:
            producer.write([b"x" * 100])
            with rings.RawSegment(producer.fileno()) as segment:
                for _ in range(chance.randint(1, 3)):
                    segment.flip(8 * chance.randrange(6), chance.randrange(64))
            try:
                with RingConsumer.attach(producer.fileno()) as consumer:
                    raised[_read(consumer)] += 1
            except SegmentError:
                raised["SegmentError"] += 1
    return raised


# --- memory that was gone ---------------------------------------------------------------


def _make_a_lease() -> None:
    """What keeps an array's record alive is of a type that anybody can call."""
    with rings.pair() as (producer, consumer):
        producer.write([bytes(64)])
        lease_type: Any = type(consumer.acquire().array("u1", (64,)).base)
    # Without a record, it counted a view less where None has none.
    after_none = ctypes.c_int * 64
    before = list(after_none.from_address(id(None)))
    for _ in range(100_000):
        lease_type()
    after = list(after_none.from_address(id(None)))
    differences = [new - old for new, old in zip(after, before, strict=True)]
    assert -100_000 not in differences, f"None was written to: {differences}"


def _close_while_looking_for_the_peer() -> None:
    """Another thread may close the ring while a wait asks whether the peer lives."""
    gone, event = os.pipe()
    os.write(event, b"its end")
    with rings.pair() as (producer, consumer):
        with rings.RawSegment(producer.fileno()) as segment:
            segment[rings.CREATOR] = os.getppid()

        def open_pidfd(pid: int, ticks: int = 0) -> int:  # noqa: ARG001
            producer.write([b"late"])
            consumer.close()
            return gone

        process.open_pidfd = open_pidfd
        with contextlib.suppress(RingClosed):
            consumer.acquire(timeout_s=10)
            raise AssertionError("a record from a closed end")
    os.close(event)
    with contextlib.suppress(OSError):
        os.fstat(gone)
        raise AssertionError("the pidfd was left open")


class _Closer:
    """Garbage that closes a ring when it is collected."""

    def __init__(self, ring: RingProducer | RingConsumer) -> None:
        self._ring = ring
        self._itself = self

    def __del__(self) -> None:
        self._ring.close()


def _close_in_a_collection() -> None:
    """Whatever is allocated may start a collection, and that may close the ring."""
    thresholds = gc.get_threshold()
    for allocations in range(1, 20):
        with rings.pair() as (producer, consumer):
            producer.write([bytes(100)])
            takes: tuple[tuple[Any, Callable[[], Any]], ...] = (
                (producer, functools.partial(producer.reserve, 100)),
                (consumer, consumer.acquire),
            )
            for ring, take in takes:
                gc.collect()
                _Closer(ring)
                try:
                    gc.set_threshold(allocations)
                    held = take()
                    gc.set_threshold(*thresholds)
                    bytes(held)
                except RingClosed:
                    continue
                finally:
                    gc.set_threshold(*thresholds)


class _ClosingTimeout:
    """A number whose conversion runs Python, where other threads get their turn."""

    def __init__(self, ring: RingProducer | RingConsumer) -> None:
        self._ring = ring

    def __float__(self) -> float:
        self._ring.close()
        return 0.0


def _close_in_a_conversion() -> None:
    """Of `timeout_s`."""
    for take in (
        lambda producer, _: producer.reserve(8, timeout_s=_ClosingTimeout(producer)),
        lambda producer, _: producer.write([b"8 bytes."], timeout_s=_ClosingTimeout(producer)),
        lambda _, consumer: consumer.acquire(_ClosingTimeout(consumer)),
    ):
        with rings.pair() as ends:
            assert rings.raised_by(functools.partial(take, *ends)) is RingClosed


CRASHES: dict[str, Callable[[], None]] = {
    function.__name__.removeprefix("_").replace("_", "-"): function
    for function in (
        _make_a_lease,
        _close_while_looking_for_the_peer,
        _close_in_a_collection,
        _close_in_a_conversion,
    )
}
