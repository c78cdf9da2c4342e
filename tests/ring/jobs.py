"""What the processes of these tests do: one function a job, called with strings.

A source is a segment's name or the number of an inherited fd.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import resource
import select
import sys
import warnings
from collections.abc import Callable

from moeshm import RingConsumer, RingProducer
from moeshm.errors import ForkedProcess, RingClosed, RingEmpty, SegmentError
from tests.ring import hostility, rings, traffic

JOBS: dict[str, Callable[..., None]] = {}


def job(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function callable by its name."""
    JOBS[function.__name__] = function
    return function


def say(*words: object) -> None:
    """A line for the parent."""
    print(*words, flush=True)


def wait_for_parent() -> None:
    """Until it says `go_on`, or is gone."""
    sys.stdin.read()


def _source(text: str) -> str | int:
    return text if text.startswith("/") else int(text)


# --- life and death ---------------------------------------------------------------------


@job
def create(name: str, capacity: str = "4096") -> None:
    """Make a named ring and hold it."""
    with RingProducer.create(name, int(capacity)):
        say("ready")
        wait_for_parent()


@job
def write_and_wait(source: str, count: str, is_closing: str = "") -> None:
    """Be the producer: write records, then wait, with one more reserved."""
    producer = RingProducer.attach(_source(source))
    for number in range(int(count)):
        producer.write([f"record {number}".encode()])
    _reserved = producer.reserve(64)
    if is_closing:
        producer.close()
    say("ready")
    wait_for_parent()


@job
def read_nothing(source: str) -> None:
    """Be a consumer that never reads."""
    with RingConsumer.attach(_source(source)):
        say("ready")
        wait_for_parent()


@job
def leave_open(source: str) -> None:
    """Exit with everything still open: the interpreter takes it down in its own order."""
    producer = RingProducer.attach(_source(source))
    producer.write([b"left"])
    sys.modules["kept"] = [producer, producer.reserve(64), memoryview(producer.reserve(8))]  # type: ignore[assignment]
    say("ready")


@job
def use_in_forked_child() -> None:
    """Fork with a ring open: the child may do nothing with it, and does the parent no harm."""
    warnings.simplefilter("ignore", DeprecationWarning)  # of fork with NumPy's threads
    with rings.pair() as (producer, consumer):
        producer.write([b"before"])
        record = consumer.acquire()
        reservation = producer.reserve(8)
        refused = (
            lambda: producer.reserve(8),
            lambda: producer.write([b"child"]),
            consumer.acquire,
            reservation.commit,
            producer.fileno,
            lambda: producer.peer_closed,
            consumer.watch,
        )
        pid = os.fork()
        if pid == 0:
            failures = [call for call in refused if rings.raised_by(call) is not ForkedProcess]
            record.release()
            reservation.abort()
            producer.close()
            del record, reservation, producer, consumer, refused
            gc.collect()
            os._exit(len(failures))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert bytes(record) == b"before"
        assert not consumer.peer_closed
        memoryview(reservation)[:] = b"parent's"
        reservation.commit()
        with consumer.acquire(0) as second:
            assert bytes(second) == b"parent's"
        record.release()
        assert consumer.outstanding == 0
    say("unhurt")


# --- limits -----------------------------------------------------------------------------


@job
def create_in_small_shm(name: str) -> None:
    """With a /dev/shm of 1 MiB: a named ring of 8 MiB is refused, an anonymous one is not."""
    try:
        RingProducer.create(name, 8 << 20)
    except SegmentError as error:
        say(error)
    assert os.listdir("/dev/shm") == []
    with RingProducer.create(name, 256 << 10) as ring, ring.reserve(256 << 10) as view:
        view[:] = bytes(len(view))
    with RingProducer.create(None, 8 << 20) as ring, ring.reserve(8 << 20) as view:
        view[:] = bytes(len(view))


@job
def create_beyond_file_size() -> None:
    """With RLIMIT_FSIZE below the ring's size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    before = os.listdir("/proc/self/fd")
    with contextlib.suppress(SegmentError):
        RingProducer.create(None, 8 << 20)
        say("made")
    assert os.listdir("/proc/self/fd") == before
    try:
        RingConsumer.create(None, 8 << 20)
    except SegmentError as error:
        say(error)


@job
def wait_without_fds(source: str) -> None:
    """Wait for a living producer when no more fds can be opened."""
    with RingConsumer.attach(_source(source)) as consumer:
        resource.setrlimit(resource.RLIMIT_NOFILE, (consumer.fileno() + 1, 4096))
        try:
            consumer.acquire(timeout_s=0.1)
        except RingEmpty:
            say("empty")


# --- traffic ----------------------------------------------------------------------------


@job
def produce(source: str, *plan: str) -> None:
    """Send what the plan says."""
    with RingProducer.attach(_source(source)) as producer:
        traffic.produce(producer, traffic.Plan.parse(plan))


@job
def consume(source: str, *plan: str) -> None:
    """Receive and check what the plan says."""
    with RingConsumer.attach(_source(source)) as consumer:
        traffic.consume(consumer, traffic.Plan.parse(plan))
        with contextlib.suppress(RingClosed):
            say("one too many:", consumer.acquire())


@job
def echo(there: str, back: str, count: str, spin_us: str) -> None:
    """Answer each record with itself; then say how often that slept."""
    with (
        RingConsumer.attach(_source(there), spin_us=float(spin_us)) as rx,
        RingProducer.attach(_source(back), spin_us=float(spin_us)) as tx,
    ):
        say("ready")
        for _ in range(int(count)):
            with rx.acquire() as record:
                tx.write([record])
        say(rx.counters()["sleeps"])


@job
def abort_without_end(source: str, count: str) -> None:
    """Reserve and abort, always with a newer one open: each aborted record is published."""
    with RingProducer.attach(_source(source)) as producer:
        older = producer.reserve(8)
        say("ready")
        for _ in range(int(count)):
            newer = producer.reserve(8)
            older.abort()
            older = newer


# --- hostility --------------------------------------------------------------------------


@job
def damage_while_running(seed: str, rounds: str) -> None:
    """Flip bits of a ring's segment under its ends' feet; say what these raised."""
    say(*hostility.damage_while_running(int(seed), int(rounds)))


@job
def change_without_a_record(fd: str) -> None:
    """Be a producer that only turns its REBASED bit over, as fast as can be."""
    words = bytes(8), (2).to_bytes(8, "little")
    with mmap.mmap(int(fd), 0) as segment:
        say("ready")
        while not select.select([sys.stdin], [], [], 0)[0]:
            for _ in range(100_000):
                for word in words:
                    segment[rings.PRODUCER_WORD : rings.PRODUCER_WORD + 8] = word


@job
def attach_to_damaged(seed: str, rounds: str) -> None:
    """Attach to segments with flipped bits; say what that raised."""
    say(*hostility.attach_to_damaged(int(seed), int(rounds)))


@job
def survive(name: str) -> None:
    """Do what once read memory that was gone."""
    hostility.CRASHES[name]()
    say("alive")


if __name__ == "__main__":
    JOBS[sys.argv[1]](*sys.argv[2:])
