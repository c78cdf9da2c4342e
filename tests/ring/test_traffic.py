"""Two processes: every record arrives once, whole and in order, whatever waits that takes.

Rings are small, so both sides run into their ends: full and empty waits, spinning and sleeping.
"""

from __future__ import annotations

import pytest

from moeshm import RingConsumer, RingProducer
from moeshm.errors import RingClosed, RingEmpty
from tests.ring import rings, traffic
from tests.ring.children import child

SPINS_US = {"sleeping": 0.0, "spinning": 50.0}
NEAR_THE_END = rings.POSITIONS - 3 * 4096


@pytest.mark.parametrize("spin", SPINS_US)
@pytest.mark.parametrize("first_position", [0, NEAR_THE_END], ids=["from 0", "past 2^63"])
@pytest.mark.parametrize("capacity", [4096, 16384])
def test_records_to_another_process(
    seed: int, capacity: int, first_position: int, spin: str
) -> None:
    plan = traffic.Plan(seed, 6000, capacity - 4, SPINS_US[spin])
    with RingProducer.create(None, capacity, first_position=first_position) as producer:
        fd = producer.fileno()
        with child("consume", fd, *plan.words(), fds=[fd]) as consumer:
            traffic.produce(producer, plan)
            producer.close()
            assert consumer.finish() == ""


@pytest.mark.parametrize("spin", SPINS_US)
@pytest.mark.parametrize("first_position", [0, NEAR_THE_END], ids=["from 0", "past 2^63"])
def test_records_from_another_process(seed: int, first_position: int, spin: str) -> None:
    plan = traffic.Plan(seed, 6000, 4096 - 4, SPINS_US[spin])
    with RingConsumer.create(None, 4096, first_position=first_position) as consumer:
        fd = consumer.fileno()
        with child("produce", fd, *plan.words(), fds=[fd]) as producer:
            traffic.consume(consumer, plan)
            with pytest.raises(RingClosed):
                consumer.acquire()
            producer.finish()


def test_the_beginning_is_used_again_between_processes(seed: int) -> None:
    """A ring that is large beside its records: the producer goes back when it is empty."""
    capacity = 512 << 10
    plan = traffic.Plan(seed, 2000, 96 << 10, 0.0)
    with RingConsumer.create(None, capacity) as consumer:
        fd = consumer.fileno()
        with child("produce", fd, *plan.words(), fds=[fd]) as producer:
            traffic.consume(consumer, plan)
            producer.finish()


def test_a_producer_that_only_aborts_does_not_hold_up_a_timeout() -> None:
    with RingConsumer.create(None, 4096) as consumer:
        fd = consumer.fileno()
        with child("abort_without_end", fd, 10_000_000, fds=[fd]) as producer:
            assert producer.line() == "ready"
            # The producer's end would be another error.
            with pytest.raises(RingEmpty):
                consumer.acquire(timeout_s=0.05)
