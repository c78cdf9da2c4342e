"""Records that their producer takes back: passed over, and never for longer than a moment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moeshm import RingConsumer, RingProducer
from moeshm._ring import MAX_OUTSTANDING
from moeshm.errors import RingEmpty

N_ROUNDS = 100
#: The last of each round's is as if it had never been.
N_TAKEN_BACK = N_ROUNDS * (MAX_OUTSTANDING - 1)


@pytest.fixture
def consumer() -> Iterator[RingConsumer]:
    """What it has to pass over lies before the one record that was sent."""
    with (
        RingProducer.create(None, 1 << 20) as producer,
        RingConsumer.attach(producer.fileno()) as consumer,
    ):
        for _ in range(N_ROUNDS):
            for each in [producer.reserve(0) for _number in range(MAX_OUTSTANDING)]:
                each.abort()
        producer.write((b"sent",))
        yield consumer


def test_whoever_does_not_wait_is_not_kept(consumer: RingConsumer) -> None:
    """A producer may take back as fast as they are passed over, and for ever."""
    n_empty = 0
    while True:
        try:
            with consumer.acquire(0.0) as record:
                assert bytes(record) == b"sent"
                break
        except RingEmpty:
            n_empty += 1
    assert 10 < n_empty < N_TAKEN_BACK


@pytest.mark.parametrize("timeout_s", [30.0, None])
def test_whoever_waits_gets_what_comes_after_them(
    consumer: RingConsumer, timeout_s: float | None
) -> None:
    with consumer.acquire(timeout_s) as record:
        assert bytes(record) == b"sent"
    assert consumer.outstanding == 0
