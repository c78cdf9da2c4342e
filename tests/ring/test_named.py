"""Rings found by name: unlinked once both ends have them, replaced when stale, never mistaken."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeshm import RingConsumer, RingProducer, process, segment
from moeshm.errors import RingEmpty, SegmentError
from tests.ring import rings
from tests.ring.children import child


@contextlib.contextmanager
def foreign_segment(name: str, content: bytes) -> Iterator[Path]:
    """Another program's file where segments are."""
    path = Path(f"/dev/shm{name}")
    path.write_bytes(content)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def leave_stale(name: str) -> None:
    """A segment whose creator was killed."""
    with child("create", name) as creator:
        assert creator.line() == "ready"
        creator.kill()
    assert rings.is_linked(name)


# --- a name's life ----------------------------------------------------------------------


def test_a_named_ring_is_private_and_unlinked_once_both_ends_have_it(name: str) -> None:
    with RingProducer.create(name, 4096) as producer:
        assert producer.name == name
        assert stat.S_IMODE(os.stat(f"/dev/shm{name}").st_mode) == 0o600
        with RingConsumer.attach(name) as consumer:
            assert not rings.is_linked(name)
            producer.write([b"found"])
            with consumer.acquire(0) as record:
                assert bytes(record) == b"found"


def test_either_end_may_make_it(name: str) -> None:
    with RingConsumer.create(name, 4096) as consumer, RingProducer.attach(name) as producer:
        producer.write([b"found"])
        assert bytes(consumer.acquire(0)) == b"found"


def test_a_name_nobody_attached_to_goes_with_its_creator(name: str) -> None:
    with RingConsumer.create(name, 4096):
        assert rings.is_linked(name)
    assert not rings.is_linked(name)


def test_closing_leaves_a_later_ring_of_the_same_name_alone(name: str) -> None:
    with (
        RingProducer.create(name, 4096) as first,
        RingConsumer.attach(name),
        RingProducer.create(name, 4096),
    ):
        first.close()
        assert rings.is_linked(name)


def test_between_processes(name: str) -> None:
    with RingConsumer.create(name, 4096) as consumer, child("write_and_wait", name, 1) as producer:
        assert producer.line() == "ready"
        assert not rings.is_linked(name)
        assert bytes(consumer.acquire(0)) == b"record 0"


# --- refused ----------------------------------------------------------------------------


def test_a_name_in_use_is_taken(name: str) -> None:
    with RingProducer.create(name, 4096):
        with pytest.raises(SegmentError, match=r"its creator lives .* choose another") as info:
            RingConsumer.create(name, 4096)
        assert info.value.errno == errno.EEXIST
        assert rings.is_linked(name)


def test_a_name_in_use_by_another_process_is_taken(name: str) -> None:
    with child("create", name) as creator:
        assert creator.line() == "ready"
        with pytest.raises(SegmentError, match="its creator lives"):
            RingConsumer.create(name, 4096)
        creator.go_on()
        creator.finish()
    assert not rings.is_linked(name)


@pytest.mark.parametrize("bad", ["", "/", "ring", "/a/b", "//a", "/" + "x" * 255])
def test_bad_names(bad: str) -> None:
    with pytest.raises(SegmentError, match="one slash"):
        RingProducer.create(bad, 4096)
    with pytest.raises(SegmentError, match="one slash"):
        RingProducer.attach(bad)


def test_a_name_without_a_segment(name: str) -> None:
    with pytest.raises(SegmentError, match="its creator must make it first"):
        RingConsumer.attach(name)


def test_attaching_to_the_same_end_is_refused_and_takes_nothing(name: str) -> None:
    with RingProducer.create(name, 4096):
        with pytest.raises(SegmentError, match="attach the other one"):
            RingProducer.attach(name)
        RingConsumer.attach(name).close()


def test_another_epoch_is_refused_and_takes_nothing(name: str) -> None:
    with RingProducer.create(name, 4096, epoch=7):
        with pytest.raises(SegmentError, match="has epoch 7; expected 8"):
            RingConsumer.attach(name, epoch=8)
        with RingConsumer.attach(name, epoch=7) as consumer:
            assert consumer.epoch == 7


def test_a_bad_spin_us_takes_nothing(name: str) -> None:
    with RingProducer.create(name, 4096):
        for bad in (-1, float("nan"), 1e10):
            with pytest.raises(ValueError, match="spin_us"):
                RingConsumer.attach(name, spin_us=bad)
        RingConsumer.attach(name).close()
    with pytest.raises(ValueError, match="spin_us"):
        RingProducer.create(name, 4096, spin_us=-1)
    assert not rings.is_linked(name)


@pytest.mark.parametrize("size", [0, 100, 4096, 3 * 4096, 3 * 4096 + 1, 4 * 4096])
def test_a_segment_that_is_no_ring(name: str, size: int) -> None:
    with foreign_segment(name, bytes(size)) as path:
        with pytest.raises(SegmentError, match=r"no ring|not finished"):
            RingConsumer.attach(name)
        assert path.stat().st_size == size


# --- stale ------------------------------------------------------------------------------


def test_the_segment_of_a_dead_creator_is_replaced(name: str) -> None:
    leave_stale(name)
    with RingProducer.create(name, 8192), RingConsumer.attach(name) as consumer:
        assert consumer.capacity == 8192


def test_a_recycled_pid_is_not_its_creator(name: str) -> None:
    """The pid lives, but it is of a process that started at another time."""
    leave_stale(name)
    with open(f"/dev/shm{name}", "r+b") as file, rings.RawSegment(file.fileno()) as raw:
        raw[rings.CREATOR] = os.getpid()
        assert process.own_identity()[1] != raw[rings.CREATOR + 8]
    RingProducer.create(name, 4096).close()


def test_sweep_removes_what_dead_creators_left_and_nothing_else(name: str) -> None:
    stale, live, foreign, folder = (f"{name}-{what}" for what in ("stale", "live", "not", "dir"))
    leave_stale(stale)
    os.mkdir(f"/dev/shm{folder}")
    with (
        RingProducer.create(live, 4096),
        foreign_segment(foreign, bytes(range(1, 201))) as foreign_path,
    ):
        try:
            assert segment.sweep(name) == [stale]
        finally:
            os.rmdir(f"/dev/shm{folder}")
        assert rings.is_linked(live)
        assert foreign_path.read_bytes() == bytes(range(1, 201))


def test_another_programs_file_is_never_replaced(name: str) -> None:
    content = bytes(range(1, 201))
    with foreign_segment(name, content) as path:
        with pytest.raises(SegmentError):
            RingProducer.create(name, 4096)
        assert path.read_bytes() == content


def test_two_that_replace_the_same_stale_segment(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second, which found it stale before the first replaced it, must not remove the new."""
    leave_stale(name)
    is_alive = process.is_alive
    rivals: list[RingProducer] = []

    def lose_time(pid: int, ticks: int) -> bool:
        monkeypatch.setattr(process, "is_alive", is_alive)
        with contextlib.suppress(SegmentError):
            rivals.append(RingProducer.create(name, 4096))
        return is_alive(pid, ticks)

    monkeypatch.setattr(process, "is_alive", lose_time)
    made: list[RingProducer] = []
    with contextlib.suppress(SegmentError):
        made.append(RingProducer.create(name, 8192))
    (only,) = rivals + made
    with only, RingConsumer.attach(name) as consumer:
        assert consumer.capacity == only.capacity


def test_a_segment_that_was_replaced_meanwhile_is_not_removed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_stale(name)
    open_named = segment.open_named
    rivals: list[RingProducer] = []

    def lose_time(wanted: str) -> int:
        fd = open_named(wanted)
        monkeypatch.setattr(segment, "open_named", open_named)
        rivals.append(RingProducer.create(name, 4096))
        return fd

    monkeypatch.setattr(segment, "open_named", lose_time)
    with pytest.raises(SegmentError, match="its creator lives"):
        RingProducer.create(name, 8192)
    (rival,) = rivals
    with rival, RingConsumer.attach(name) as consumer:
        assert consumer.capacity == 4096


# --- the peer ---------------------------------------------------------------------------


def test_a_wait_without_a_peer_is_no_death(name: str) -> None:
    with RingConsumer.create(name, 4096) as consumer, pytest.raises(RingEmpty):
        consumer.acquire(timeout_s=0.05)


def test_running_out_of_fds_is_not_the_peers_death() -> None:
    with RingProducer.create(None, 4096) as producer:
        fd = producer.fileno()
        with child("wait_without_fds", fd, fds=[fd]) as consumer:
            assert consumer.line() == "empty"
            consumer.finish()
