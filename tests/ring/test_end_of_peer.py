"""The other end closes, dies or is forked: what it sent comes first, then the right error."""

from __future__ import annotations

import os
import socket

import pytest

from moeshm import RingConsumer, RingProducer, process
from moeshm.errors import PeerDied, RingClosed, RingEmpty
from tests.ring import rings
from tests.ring.children import child

Ring = tuple[RingProducer, RingConsumer]


def read_all(consumer: RingConsumer, count: int) -> None:
    for number in range(count):
        with consumer.acquire(rings.PATIENCE_S) as record:
            assert bytes(record) == f"record {number}".encode()


# --- closed -----------------------------------------------------------------------------


def test_what_was_committed_comes_before_ring_closed(ring: Ring) -> None:
    producer, consumer = ring
    producer.write([b"record 0"])
    reserved = producer.reserve(8)
    producer.write([b"behind the open one"])
    producer.close()
    assert consumer.peer_closed
    read_all(consumer, 1)
    for timeout_s in (0, None):
        with pytest.raises(RingClosed, match="all it sent was read"):
            consumer.acquire(timeout_s)
    with pytest.raises(RingClosed):
        reserved.commit()


def test_a_producer_learns_at_once_that_the_consumer_closed(ring: Ring) -> None:
    producer, consumer = ring
    consumer.close()
    assert producer.peer_closed
    for timeout_s in (0, None):
        with pytest.raises(RingClosed, match="the consumer closed the ring"):
            producer.write([b"in vain"], timeout_s=timeout_s)


def test_a_closed_end_refuses_everything_but_closing(ring: Ring) -> None:
    for end in ring:
        end.close()
        end.close()
        assert end.closed
        for use in (end.fileno, end.watch, lambda end=end: end.peer_closed):
            with pytest.raises(RingClosed, match="this end of the ring is closed"):
                use()
    for act in (lambda: ring[0].reserve(1), lambda: ring[0].write([]), ring[1].acquire):
        with pytest.raises(RingClosed, match="this end of the ring is closed"):
            act()


def test_a_process_that_closes_and_exits_did_not_die() -> None:
    with RingConsumer.create(None, 4096) as consumer:
        fd = consumer.fileno()
        with child("write_and_wait", fd, 3, "closing", fds=[fd]) as producer:
            assert producer.line() == "ready"
            producer.kill()
            read_all(consumer, 3)
            with pytest.raises(RingClosed):
                consumer.acquire()


def test_an_interpreter_that_exits_with_an_open_ring_is_silent_and_seen() -> None:
    with RingConsumer.create(None, 4096) as consumer:
        fd = consumer.fileno()
        with child("leave_open", fd, fds=[fd]) as producer:
            assert producer.finish() == "ready\n"
        assert bytes(consumer.acquire(0)) == b"left"
        with pytest.raises((RingClosed, PeerDied)):
            consumer.acquire()


# --- dead -------------------------------------------------------------------------------


def test_what_was_committed_comes_before_peer_died() -> None:
    with RingConsumer.create(None, 4096) as consumer:
        fd = consumer.fileno()
        with child("write_and_wait", fd, 5, fds=[fd]) as producer:
            assert producer.line() == "ready"
            producer.kill()
        read_all(consumer, 5)
        for timeout_s in (0, None):
            with pytest.raises(PeerDied, match="all it sent was read"):
                consumer.acquire(timeout_s)


def test_what_comes_while_a_wait_finds_the_peer_dead_comes_first(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer, consumer = ring
    ended, event = os.pipe()
    os.write(event, b"readable, like the pidfd of a process that ended")
    with rings.RawSegment(producer.fileno()) as segment:
        segment[rings.CREATOR] = os.getppid()

    def open_pidfd(_pid: int, _ticks: int) -> int:
        producer.write([b"record 0"])
        return ended

    monkeypatch.setattr(process, "open_pidfd", open_pidfd)
    read_all(consumer, 1)
    with pytest.raises(PeerDied):
        consumer.acquire()
    os.close(event)


def test_a_death_during_a_wait_ends_it() -> None:
    with RingConsumer.create(None, 4096) as consumer:
        fd = consumer.fileno()
        with child("write_and_wait", fd, 0, fds=[fd]) as producer:
            assert producer.line() == "ready"
            waiting = rings.sleeping(consumer, consumer.acquire)
            producer.kill()
            with pytest.raises(PeerDied):
                waiting.result()


def test_a_dead_consumer_is_seen_when_the_ring_is_full() -> None:
    with RingProducer.create(None, 4096) as producer:
        fd = producer.fileno()
        with child("read_nothing", fd, fds=[fd]) as consumer:
            assert consumer.line() == "ready"
            producer.write([bytes(4096)])
            waiting = rings.sleeping(producer, lambda: producer.write([bytes(4096)]))
            consumer.kill()
            with pytest.raises(PeerDied):
                waiting.result()
        with pytest.raises(PeerDied):
            producer.write([bytes(4096)])


def test_a_dead_creator_is_seen_by_the_attacher(name: str) -> None:
    with child("create", name) as creator:
        assert creator.line() == "ready"
        with RingConsumer.attach(name) as consumer:
            with pytest.raises(RingEmpty):
                consumer.acquire(0.03)
            creator.kill()
            with pytest.raises(PeerDied):
                consumer.acquire()


def test_a_watched_socket_that_hangs_up_is_a_death(ring: Ring) -> None:
    _, consumer = ring
    ours, theirs = socket.socketpair()
    with ours:
        consumer.watch(ours.fileno())
        with theirs, pytest.raises(RingEmpty):
            consumer.acquire(0.03)
        with pytest.raises(PeerDied):
            consumer.acquire()


def test_a_watched_pidfd_stays_the_callers() -> None:
    with RingConsumer.create(None, 4096) as consumer:
        fd = consumer.fileno()
        with child("write_and_wait", fd, 1, fds=[fd]) as producer:
            assert producer.line() == "ready"
            pidfd = os.pidfd_open(producer.pid)
            consumer.acquire(0).release()
            with pytest.raises(RingEmpty):  # finds the peer by itself, before it is told
                consumer.acquire(0)
            consumer.watch(pidfd=pidfd)
            with pytest.raises(RingEmpty):
                consumer.acquire(0)
            producer.kill()
            with pytest.raises(PeerDied):
                consumer.acquire()
        consumer.close()
        os.close(pidfd)


# --- forked -----------------------------------------------------------------------------


def test_a_forked_child_may_use_nothing_and_harms_nothing() -> None:
    with child("use_in_forked_child") as parent:
        assert parent.finish() == "unhurt\n"
