"""Waits: until the timeout and no longer, without the GIL, ended by what they wait for."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time

import pytest

from moeshm import RingConsumer, RingProducer
from moeshm.errors import RingClosed, RingEmpty, RingError, RingFull
from tests.ring import rings
from tests.ring.children import child

Ring = tuple[RingProducer, RingConsumer]
#: Longer than any test: such a wait spins to its end.
FOR_EVER_US = 1e9


# --- timeouts ---------------------------------------------------------------------------


@pytest.mark.parametrize("timeout_s", [0, 0.0, -1, 1e-9, 0.03])
def test_an_empty_ring_times_out(ring: Ring, timeout_s: float) -> None:
    producer, consumer = ring
    with pytest.raises(RingEmpty, match=f"within {timeout_s} s"):
        consumer.acquire(timeout_s)
    producer.write([b"then"])
    assert bytes(consumer.acquire(timeout_s)) == b"then"


@pytest.mark.parametrize("timeout_s", [0, 0.0, -1, 1e-9, 0.03])
def test_a_full_ring_times_out(ring: Ring, timeout_s: float) -> None:
    producer, consumer = ring
    producer.write([bytes(rings.PAGE)])
    for send in (
        lambda: producer.reserve(rings.PAGE, timeout_s=timeout_s),
        lambda: producer.write([bytes(rings.PAGE)], timeout_s=timeout_s),
    ):
        with pytest.raises(RingFull, match="no room for 4160 bytes: 4160 of 8192 are unread"):
            send()
    assert producer.outstanding == 0
    consumer.acquire(0).release()
    producer.write([bytes(rings.PAGE)], timeout_s=timeout_s)


def test_timeouts_are_timeout_errors_and_last_so_long(ring: Ring) -> None:
    _, consumer = ring
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        consumer.acquire(0.06)
    assert time.monotonic() - start >= 0.06


def test_a_timeout_that_is_no_number(ring: Ring) -> None:
    _, consumer = ring
    with pytest.raises(ValueError, match="timeout_s is NaN"):
        consumer.acquire(float("nan"))


@pytest.mark.parametrize("timeout_s", [None, 1e300, float("inf")])
def test_waits_without_end(ring: Ring, timeout_s: float | None) -> None:
    producer, consumer = ring
    waiting = rings.sleeping(consumer, lambda: consumer.acquire(timeout_s))
    producer.write([b"x"])
    waiting.result().release()


# --- what ends a wait -------------------------------------------------------------------


@pytest.mark.parametrize("spin_us", [0.0, 50.0, FOR_EVER_US])
def test_other_threads_run_while_one_waits_for_a_record(spin_us: float) -> None:
    with rings.pair(spin_us=spin_us) as (producer, consumer):
        for _ in range(20):
            waiting = rings.waiting(consumer, lambda: bytes(consumer.acquire(rings.PATIENCE_S)))
            # Had the wait kept the GIL, this line would not be reached.
            producer.write([b"came"])
            assert waiting.result() == b"came"


@pytest.mark.parametrize("spin_us", [0.0, 50.0, FOR_EVER_US])
def test_other_threads_run_while_one_waits_for_room(spin_us: float) -> None:
    with rings.pair(spin_us=spin_us) as (producer, consumer):
        producer.write([bytes(rings.PAGE)])
        for _ in range(20):
            waiting = rings.waiting(producer, lambda: producer.write([bytes(rings.PAGE)]))
            consumer.acquire(0).release()
            waiting.result()


def test_a_sleeper_is_woken_and_does_not_wait_for_its_slice(ring: Ring) -> None:
    """Coarsely: it would come to the same 25 ms later, if nobody woke it."""
    producer, consumer = ring
    count = 200
    start = time.monotonic()
    for _ in range(count):
        waiting = rings.sleeping(consumer, consumer.acquire)
        producer.write([b"wake up"])
        waiting.result().release()
    assert producer.counters()["wakes"] == count
    assert time.monotonic() - start < count * 0.025 / 2


@pytest.mark.parametrize("spin_us", [0.0, FOR_EVER_US])
def test_closing_ends_a_wait_of_another_thread(spin_us: float) -> None:
    with rings.pair(spin_us=spin_us) as (producer, consumer):
        producer.write([bytes(rings.PAGE)])
        full = rings.waiting(producer, lambda: producer.reserve(rings.PAGE))
        producer.close()
        with pytest.raises(RingClosed, match="closed by another thread"):
            full.result()
        consumer.acquire(0).release()
    with rings.pair(spin_us=spin_us) as (_, consumer):
        empty = rings.waiting(consumer, consumer.acquire)
        consumer.close()
        with pytest.raises(RingClosed, match="closed by another thread"):
            empty.result()


@pytest.mark.parametrize("spin_us", [0.0, FOR_EVER_US])
def test_the_peers_close_ends_a_wait(spin_us: float) -> None:
    with rings.pair(spin_us=spin_us) as (producer, consumer):
        empty = rings.waiting(consumer, consumer.acquire)
        producer.close()
        with pytest.raises(RingClosed, match="all it sent was read"):
            empty.result()
    with rings.pair(spin_us=spin_us) as (producer, consumer):
        producer.write([bytes(rings.PAGE)])
        full = rings.waiting(producer, lambda: producer.reserve(rings.PAGE))
        consumer.close()
        with pytest.raises(RingClosed):
            full.result()


def test_the_peers_close_wakes_a_sleeper(ring: Ring) -> None:
    """Sleeping through it until the slice ends would come to the same, 25 ms later."""
    producer, consumer = ring
    waiting = rings.sleeping(consumer, consumer.acquire)
    with rings.RawSegment(producer.fileno()) as raw:
        # Between slices, the bit is set; only a publish clears it.
        rings.until(lambda: raw[rings.PRODUCER_WORD] & 1)
        producer.close()
        assert not raw[rings.PRODUCER_WORD] & 1
    assert producer.counters()["wakes"] == 1
    with pytest.raises(RingClosed):
        waiting.result()


@pytest.mark.parametrize("spin_us", [0.0, FOR_EVER_US])
def test_ctrl_c_ends_a_wait(spin_us: float) -> None:
    def interrupt() -> None:
        rings.until(lambda: consumer.counters()["waits"])
        os.kill(os.getpid(), signal.SIGINT)

    with rings.pair(spin_us=spin_us) as (producer, consumer):
        # A shell ignores it for what it runs in the background, and so would we.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            consumer.acquire(rings.PATIENCE_S)
        thread.join()
        signal.signal(signal.SIGINT, before)
        producer.write([b"on it goes"])
        assert bytes(consumer.acquire(0)) == b"on it goes"


def test_two_threads_cannot_wait_at_one_end(ring: Ring) -> None:
    producer, consumer = ring
    first = rings.sleeping(consumer, consumer.acquire)
    with pytest.raises(RingError, match="another thread waits at this end"):
        consumer.acquire(0)
    producer.write([b"for the first"])
    assert bytes(first.result()) == b"for the first"


# --- what a wait costs ------------------------------------------------------------------


def test_an_idle_consumer_burns_no_cpu() -> None:
    with rings.pair(spin_us=50) as (_, consumer):
        before, start = resource.getrusage(resource.RUSAGE_THREAD), time.monotonic()
        with pytest.raises(RingEmpty):
            consumer.acquire(0.6)
        after, elapsed_s = resource.getrusage(resource.RUSAGE_THREAD), time.monotonic() - start
        used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert used_s < 0.1 * elapsed_s
        # One sleep a slice of 25 ms; never many short ones.
        assert 1 <= consumer.counters()["sleeps"] <= 30


def test_a_pair_in_lock_step_does_not_sleep() -> None:
    count = 200
    with (
        RingProducer.create(None, 4096, spin_us=FOR_EVER_US) as tx,
        RingConsumer.create(None, 4096, spin_us=FOR_EVER_US) as rx,
    ):
        there, back = tx.fileno(), rx.fileno()
        with child("echo", there, back, count, FOR_EVER_US, fds=[there, back]) as echo:
            assert echo.line() == "ready"
            for number in range(count):
                payload = number.to_bytes(4, "little")
                tx.write([payload])
                with rx.acquire() as record:
                    assert bytes(record) == payload
            assert echo.finish() == "0\n"
        assert rx.counters()["sleeps"] == tx.counters()["sleeps"] == 0
        assert tx.counters()["wakes"] == 0


def test_spinning_stops_when_it_does_not_help() -> None:
    """The budget shrinks with each wait that outlasts it, and comes back when it would do."""
    spin_us = 20_000.0
    with rings.pair(spin_us=spin_us) as (producer, consumer):

        def cpu_s_of_a_wait() -> float:
            before = resource.getrusage(resource.RUSAGE_THREAD)
            with pytest.raises(RingEmpty):
                consumer.acquire(0.04)
            after = resource.getrusage(resource.RUSAGE_THREAD)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        first = cpu_s_of_a_wait()
        for _ in range(5):
            cpu_s_of_a_wait()
        assert cpu_s_of_a_wait() < first / 2
        assert consumer.spin_us == spin_us
        producer.write([b"x"])
        consumer.acquire(0).release()


@pytest.mark.parametrize("bad", [-1, 1e10, float("nan"), float("inf")])
def test_a_spin_out_of_range(ring: Ring, bad: float) -> None:
    with pytest.raises(ValueError, match=r"it must lie in 0\.\.1e9"):
        ring[0].spin_us = bad
    assert ring[0].spin_us == 0
