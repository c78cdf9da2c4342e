"""Rings for tests: both ends in one process, the segment as raw words, names, and events."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from moeshm import RingConsumer, RingProducer

PAGE = 4096
ALIGNMENT = 64
HEADER = 32
#: Places in the control page, as docs/ring.md has them.
MAGIC, VERSION, ROLE, AREA, EPOCH, FIRST_POSITION = 0, 8, 12, 16, 24, 32
CREATOR, ATTACHER = 64, 128
PRODUCER_WORD, PRODUCER_STATE, CONSUMER_WORD, CONSUMER_STATE = 256, 384, 512, 640
#: Places in a record's header.
LENGTH, FLAGS, RECORD_EPOCH, SEQUENCE = 0, 12, 16, 24
ABORTED = 1 << 31
#: Positions count modulo this.
POSITIONS = 1 << 63
#: No event that a test waits for takes so long, unless something hangs.
PATIENCE_S = 60.0

_numbers = itertools.count()
_WORD = struct.Struct("<Q")


def record_bytes(length: int) -> int:
    """What a record of that many payload bytes takes of the data area."""
    start = HEADER if length <= ALIGNMENT else ALIGNMENT
    return (start + length + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@contextlib.contextmanager
def pair(
    capacity: int = PAGE, *, spin_us: float = 0.0, epoch: int = 0, first_position: int = 0
) -> Iterator[tuple[RingProducer, RingConsumer]]:
    """Both ends of an anonymous ring, in this process; closed at the end."""
    with (
        RingProducer.create(
            None, capacity, spin_us=spin_us, epoch=epoch, first_position=first_position
        ) as producer,
        RingConsumer.attach(producer.fileno(), spin_us=spin_us) as consumer,
    ):
        yield producer, consumer


@contextlib.contextmanager
def unique_name() -> Iterator[str]:
    """A name for a segment that nobody else has; what begins with it is gone at the end."""
    name = f"/moeshm-test-ring-{os.getpid()}-{next(_numbers)}"
    try:
        yield name
    finally:
        for path in Path("/dev/shm").glob(f"{name[1:]}*"):
            path.unlink()


def is_linked(name: str) -> bool:
    """True while the name can be opened."""
    return os.path.exists(f"/dev/shm{name}")


class RawSegment:
    """A segment as bytes of its own mapping, for a look at it and for damage."""

    def __init__(self, fd: int) -> None:
        self._bytes = mmap.mmap(fd, 0)

    def __getitem__(self, offset: int) -> int:
        return int(_WORD.unpack_from(self._bytes, offset)[0])

    def __setitem__(self, offset: int, word: int) -> None:
        self._bytes[offset : offset + 8] = _WORD.pack(word & (1 << 64) - 1)

    def flip(self, offset: int, bit: int) -> None:
        """Turn one bit of the word at the offset over."""
        self[offset] ^= 1 << bit

    def control_page(self) -> bytes:
        """A copy of it."""
        return bytes(self._bytes[:PAGE])

    def __len__(self) -> int:
        return len(self._bytes)

    def __enter__(self) -> RawSegment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bytes.close()


def until(condition: Callable[[], object]) -> None:
    """Let others run until the condition holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{condition} did not come within {PATIENCE_S} s"
        os.sched_yield()


class Background:
    """A call in a thread; what it returned or raised comes from `result`."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error
        # Its frame keeps the ring's ends and records.
        del self._call

    def is_running(self) -> bool:
        """Until it returned or raised."""
        return self._thread.is_alive()

    def result(self) -> Any:
        """Wait for it."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the call does not end"
        if self._error is not None:
            raise self._error
        return self._value


def waiting(
    ring: RingProducer | RingConsumer, call: Callable[[], Any], counter: str = "waits"
) -> Background:
    """A call in a thread that waits by now, at that end of the ring."""
    before = ring.counters()[counter]
    background = Background(call)
    until(lambda: ring.counters()[counter] > before)
    return background


def sleeping(ring: RingProducer | RingConsumer, call: Callable[[], Any]) -> Background:
    """A call in a thread that sleeps by now, or is just about to, and is to be woken."""
    return waiting(ring, call, "sleeps")


def raised_by(call: Callable[[], object]) -> type[BaseException] | None:
    """The exception type of a call, and no reference to its frames; None when it returned."""
    try:
        call()
    except Exception as error:
        return type(error)
    return None
