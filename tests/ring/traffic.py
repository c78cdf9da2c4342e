"""A stream of records that both sides can compute: random sizes, several open on both sides."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moeshm import RingConsumer, RingProducer
from moeshm._ring import Record, Reservation
from moeshm.errors import RingEmpty, RingFull


class Plan(NamedTuple):
    """What is sent, and how."""

    seed: int
    n_records: int
    max_bytes: int
    spin_us: float

    @classmethod
    def parse(cls, words: Sequence[str]) -> Plan:
        """From what `words` gave."""
        seed, n_records, max_bytes, spin_us = words
        return cls(int(seed), int(n_records), int(max_bytes), float(spin_us))

    def words(self) -> list[str]:
        """For a command line."""
        return [str(value) for value in self]

    def payloads(self) -> Iterator[bytes]:
        """The records, in order: mostly small ones, some as large as can be."""
        chance = random.Random(self.seed)
        for _ in range(self.n_records):
            limit = chance.choice([64, 512, 512, self.max_bytes])
            yield chance.randbytes(chance.randint(0, limit))


def produce(producer: RingProducer, plan: Plan) -> None:
    """Send the plan's records, with aborted ones between them, committed in any order."""
    producer.spin_us = plan.spin_us
    # How a side goes about it is its own affair, and not of the same chance.
    chance = random.Random(plan.seed + 1)
    held: list[tuple[Reservation, bytes | None]] = []
    for number, payload in enumerate(plan.payloads()):
        if chance.random() < 0.3:
            _end_all(held, chance)
        if chance.random() < 0.1:
            held.append((_reserve(producer, 8, 0, held, chance), None))
        if chance.random() < 0.3:
            _end_all(held, chance)
            producer.write([_check(payload), payload], type=number, flags=number % 7)
        else:
            held.append((_reserve(producer, len(payload) + 4, number, held, chance), payload))
    _end_all(held, chance)


def _reserve(
    producer: RingProducer,
    size: int,
    number: int,
    held: list[tuple[Reservation, bytes | None]],
    chance: random.Random,
) -> Reservation:
    try:
        # The consumer may wait for what is held here, so this must not wait for the consumer.
        return producer.reserve(size, number, number % 7, timeout_s=0 if held else None)
    except RingFull:
        _end_all(held, chance)
        return producer.reserve(size, number, number % 7)


def _end_all(held: list[tuple[Reservation, bytes | None]], chance: random.Random) -> None:
    chance.shuffle(held)
    for reservation, payload in held:
        if payload is None:
            reservation.abort()
        else:
            with reservation as view:
                view[:4] = _check(payload)
                view[4:] = payload
    held.clear()


def consume(consumer: RingConsumer, plan: Plan) -> None:
    """Receive and check the plan's records, several held at a time and released in any order."""
    consumer.spin_us = plan.spin_us
    chance = random.Random(plan.seed + 2)
    held: list[tuple[Record, bytes]] = []
    for number, payload in enumerate(plan.payloads()):
        try:
            record = consumer.acquire(timeout_s=0 if held else None)
        except RingEmpty:
            # The producer may wait for the room that is held here.
            _release_all(held, chance)
            record = consumer.acquire()
        assert (record.type, record.flags) == (number, number % 7)
        held.append((record, payload))
        if chance.random() < 0.3:
            _release_all(held, chance)
    _release_all(held, chance)


def _release_all(held: list[tuple[Record, bytes]], chance: random.Random) -> None:
    chance.shuffle(held)
    for record, payload in held:
        # Only now: what was held must have stayed as it was.
        content = bytes(record)
        assert content[:4] == _check(content[4:]), f"record {record.type} is damaged"
        assert content[4:] == payload, f"record {record.type} is another one"
        record.release()
    held.clear()


def _check(payload: bytes) -> bytes:
    return zlib.crc32(payload).to_bytes(4, "little")
