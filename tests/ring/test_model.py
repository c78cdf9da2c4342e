"""Whatever is done in whatever order, the ring is a queue: a model of it says what must come.

Both ends are in this process, so the model knows what each may see, to the byte: RingFull comes
exactly when there is no room, and RingEmpty exactly when nothing was published.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from moeshm import RingConsumer, RingProducer
from moeshm._ring import MAX_OUTSTANDING, Record, Reservation
from moeshm.errors import RingClosed, RingEmpty, RingError, RingFull
from tests.ring import rings

# The last lets the producer go back to the beginning, to memory that is still in the caches.
CAPACITIES = (4096, 8192, 65536, 262144)
FIRST_POSITIONS = (0, 64, 1 << 40, rings.POSITIONS - 64, rings.POSITIONS - 8192)
NEWEST = -1


@dataclass(eq=False)
class Sent:
    """A record on the producer's side."""

    size: int
    content: tuple[bytes, int, int]
    reservation: Reservation | None = None
    is_done: bool = False
    is_aborted: bool = False


@dataclass(eq=False)
class Received:
    """A record on the consumer's side, with the aborted ones that followed it."""

    size: int
    record: Record | None


class RingMachine(RuleBasedStateMachine):
    """Producer and consumer against lists and a deque."""

    producer: RingProducer
    consumer: RingConsumer

    @initialize(
        capacity=st.sampled_from(CAPACITIES), first_position=st.sampled_from(FIRST_POSITIONS)
    )
    def create(self, capacity: int, first_position: int) -> None:
        self.capacity = capacity
        self.producer = RingProducer.create(
            None, capacity, spin_us=0, epoch=7, first_position=first_position
        )
        self.consumer = RingConsumer.attach(self.producer.fileno(), spin_us=0)
        self.random = random.Random(capacity ^ first_position)
        self.used = 0  # bytes from the oldest that is not freed to the newest that is reserved
        self.reserved: list[Sent] = []
        self.published: deque[Sent] = deque()
        self.acquired: list[Received] = []
        self.producer_closed = self.consumer_closed = False

    def teardown(self) -> None:
        if hasattr(self, "producer"):
            self.reserved.clear()
            self.acquired.clear()
            self.producer.close()
            self.consumer.close()

    # --- producer -----------------------------------------------------------------------

    def _draw_size(self, data: st.DataObject) -> int:
        edges = st.sampled_from([0, 1, 32, 33, 64, 65, self.capacity // 2, self.capacity])
        # Mostly small, or the ring would be full after a few.
        small = st.integers(0, 100)
        return data.draw(st.one_of(small, small, edges, st.integers(0, self.capacity)), "size")

    def _error_of_reserve(self, size: int) -> type[RingError] | None:
        if self.producer_closed:
            return RingClosed
        if len(self.reserved) == MAX_OUTSTANDING:
            return RingError
        if self.used + rings.record_bytes(size) > self.capacity + rings.PAGE:
            return RingClosed if self.consumer_closed else RingFull
        return RingClosed if self.consumer_closed else None

    @rule(
        data=st.data(),
        type=st.integers(0, 2**32 - 1),
        flags=st.integers(0, 2**31 - 1),
        is_written=st.booleans(),
    )
    def send(self, data: st.DataObject, type: int, flags: int, is_written: bool) -> None:
        size = self._draw_size(data)
        payload = self.random.randbytes(size)
        expected = self._error_of_reserve(size)
        sent = Sent(rings.record_bytes(size), (payload, type, flags))

        def begin() -> None:
            if is_written:
                half = size // 2
                self.producer.write([payload[:half], payload[half:]], type, flags, timeout_s=0)
            else:
                sent.reservation = self.producer.reserve(size, type, flags, timeout_s=0)

        assert rings.raised_by(begin) is expected
        if expected is None:
            self.used += sent.size
            self.reserved.append(sent)
            if sent.reservation is None:
                self._finish(sent)

    def _pick_open(self, data: st.DataObject) -> Sent:
        return data.draw(st.sampled_from([s for s in self.reserved if s.reservation]), "which")

    def _has_open_reservation(self) -> bool:
        return any(sent.reservation for sent in self.reserved) and not self.producer_closed

    @precondition(_has_open_reservation)
    @rule(data=st.data(), as_array=st.booleans())
    def commit(self, data: st.DataObject, as_array: bool) -> None:
        sent = self._pick_open(data)
        assert sent.reservation is not None
        payload = sent.content[0]
        view: Any = (
            sent.reservation.array("u1", (len(payload),))
            if as_array
            else memoryview(sent.reservation)
        )
        with pytest.raises(BufferError, match="1 views"):
            sent.reservation.commit()
        memoryview(view)[:] = payload
        del view
        sent.reservation.commit()
        self._finish(sent)

    @precondition(_has_open_reservation)
    @rule(data=st.data(), is_forgotten=st.booleans())
    def abort(self, data: st.DataObject, is_forgotten: bool) -> None:
        sent = self._pick_open(data)
        if is_forgotten:
            sent.reservation = None
        else:
            assert sent.reservation is not None
            sent.reservation.abort()
        if sent is self.reserved[NEWEST]:
            sent.reservation = None
            self.reserved.pop()
            self.used -= sent.size
        else:
            sent.is_aborted = True
            self._finish(sent)

    def _finish(self, sent: Sent) -> None:
        sent.reservation = None
        sent.is_done = True
        while self.reserved and self.reserved[0].is_done:
            self.published.append(self.reserved.pop(0))

    # --- consumer -----------------------------------------------------------------------

    def _error_of_acquire(self) -> type[RingError] | None:
        if self.consumer_closed:
            return RingClosed
        if len(self.acquired) == MAX_OUTSTANDING:
            return RingError
        if all(sent.is_aborted for sent in self.published):
            return RingClosed if self.producer_closed else RingEmpty
        return None

    @rule()
    def acquire(self) -> None:
        expected = self._error_of_acquire()
        held: list[Record] = []
        assert rings.raised_by(lambda: held.append(self.consumer.acquire(0))) is expected
        if self.consumer_closed or expected is RingError:
            return  # before it looked
        while self.published and self.published[0].is_aborted:
            skipped = self.published.popleft()
            if self.acquired:
                self.acquired[NEWEST].size += skipped.size
            else:
                self.used -= skipped.size
        if expected is None:
            sent = self.published.popleft()
            (record,) = held
            assert len(record) == len(sent.content[0])
            assert (bytes(record), record.type, record.flags) == sent.content
            self.acquired.append(Received(sent.size, record))

    def _has_open_record(self) -> bool:
        return any(received.record for received in self.acquired) and not self.consumer_closed

    @precondition(_has_open_record)
    @rule(data=st.data(), is_forgotten=st.booleans())
    def release(self, data: st.DataObject, is_forgotten: bool) -> None:
        received = data.draw(st.sampled_from([r for r in self.acquired if r.record]), "which")
        self._release(received, is_forgotten)

    def _release(self, received: Received, is_forgotten: bool) -> None:
        assert received.record is not None
        if not is_forgotten:
            view = memoryview(received.record)
            with pytest.raises(BufferError, match="1 views"):
                received.record.release()
            del view
            received.record.release()
        received.record = None
        while self.acquired and self.acquired[0].record is None:
            self.used -= self.acquired.pop(0).size

    @rule(is_forgotten=st.booleans())
    def empty_the_ring(self, is_forgotten: bool) -> None:
        """Only then does the producer go back to the beginning."""
        while self._error_of_acquire() is None:
            self.acquire()
        while self._has_open_record():
            self._release(next(r for r in self.acquired if r.record), is_forgotten)

    # --- the end ------------------------------------------------------------------------

    @rule(whose=st.sampled_from(["nobody's"] * 8 + ["the producer", "the consumer"]))
    def close(self, whose: str) -> None:
        if whose == "the producer":
            self.producer.close()
            self.producer_closed = True
        elif whose == "the consumer":
            self.consumer.close()
            self.consumer_closed = True

    @invariant()
    def each_end_counts_what_it_holds(self) -> None:
        if hasattr(self, "producer"):
            assert self.producer.outstanding == len(self.reserved)
            assert self.consumer.outstanding == len(self.acquired)


TestRing = RingMachine.TestCase
TestRing.settings = settings(
    max_examples=120,
    stateful_step_count=50,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
